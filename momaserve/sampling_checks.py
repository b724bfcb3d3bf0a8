"""What sampling parameters may ask of a checkpoint's vocabulary."""

from __future__ import annotations

from momaserve.errors import SamplingError
from momaserve.sampling import OutputMode, SamplingParams
from momaserve.tokens.grammar import GrammarSpec


def check_words_left(params: SamplingParams, spec: GrammarSpec) -> None:
    """Checks that there is an id to sample where those that end an answer may not be.

    Raises:
        SamplingError: there is none.
    """
    if params.mode is OutputMode.IMAGE:
        return
    banned = set(spec.unsampled_text_ids)
    if params.ignore_eos or params.min_tokens:
        banned.add(spec.eos)
    if params.min_tokens:
        banned.update(i for i in params.stop_token_ids if i not in spec.image_ids)
    if len(banned) >= spec.vocab_size - len(spec.image_ids):
        name = "min_tokens" if params.min_tokens else "ignore_eos"
        raise SamplingError(
            f"{name}: this checkpoint's vocabulary has no text token to sample but those "
            "that would end the answer",
            param=name,
        )


def check_token_ids(params: SamplingParams, vocab_size: int) -> None:
    """Checks that ids which the parameters name are there; raises SamplingError."""
    for name, ids in (
        ("stop_token_ids", params.stop_token_ids),
        ("logit_bias", tuple(params.logit_bias)),
    ):
        for token_id in ids:
            if not 0 <= token_id < vocab_size:
                raise SamplingError(
                    f"{name}: token id {token_id} is not between 0 and {vocab_size - 1}",
                    param=name,
                )
