"""Which skin-tone combinations are held out of training.

They measure whether the model composes a known person with a known tone.
"""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from momaserve.training.dictionary.item import Item, Kind

NUM_HELD_OUT: dict[Kind, int] = {"tone": 40, "zwj_tone": 110}
MIN_TRAINED_TONES = 3
SEED = 20240731


def hold_out(items: Sequence[Item], seed: int = SEED) -> list[Item]:
    """Marks a fixed set of toned pictures as held out.

    Never held out: a picture that has a twin with the same pixels, and one whose person would be
    left with fewer than `MIN_TRAINED_TONES` trained tones.

    Returns:
        The items in their order, about `NUM_HELD_OUT` of each kind with split "held_out".
    """
    has_twin = {i.duplicate_of for i in items} | {i.id for i in items if i.duplicate_of is not None}
    num_trained = Counter(item.base_name for item in items if item.tone is not None)
    order = sorted((i for i in items if i.tone is not None), key=lambda item: item.name)
    random.Random(seed).shuffle(order)
    wanted = Counter(NUM_HELD_OUT)
    chosen: set[int] = set()
    for item in order:
        if not wanted[item.kind] or item.id in has_twin:
            continue
        if num_trained[item.base_name] <= MIN_TRAINED_TONES:
            continue
        num_trained[item.base_name] -= 1
        wanted[item.kind] -= 1
        chosen.add(item.id)
    return [replace(item, split="held_out") if item.id in chosen else item for item in items]
