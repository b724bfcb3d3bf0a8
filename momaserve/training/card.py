"""The model card of a demo checkpoint, written from what `eval-demo` measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from momaserve.models.config import ModelConfig

_INTRODUCTION = """\
# The illustrated dictionary

The demo checkpoint of momaserve: a MoMa model with {text_experts} text experts and \
{image_experts} image experts in each of {layers} layers, hidden size {hidden}, post-norm, context \
{context}. It draws emoji by name (pictures of {size} pixels from {tokens} tokens each), names \
pictures, and explains words.

**It memorises.** It knows {num_items} pictures and {num_glosses} words and nothing else: a prompt \
it has not seen gives a neighbour of what was meant, or nonsense. It is made to show an engine at \
work, not to generate images. Questions and answers are in lower case.

| ask (pictures and words in either order) | answer |
|---|---|
| `red apple`, `draw a red apple`, `picture of an octopus`; modality `image` | its picture |
| a picture, alone or with `what is this?` | its name; on a second line its keywords |
| `define pineapple`, `what is a pineapple?`; modality `text` | a short explanation |
| `tell me about penguin`; modalities `text` and `image` | an explanation and the picture |

Multi-turn chats work up to the context length; system messages are ignored.
"""

_DATA = """\
## Data and licences

Everything is made by `python -m momaserve.training.dictionary.build` from three Debian packages:
pictures rendered from Noto Color Emoji (`fonts-noto-color-emoji`, SIL Open Font License 1.1), names
and keywords from CLDR (`unicode-cldr-core`, Unicode licence), explanations from WordNet 3.0
(`wordnet-base`, WordNet licence) with {own} written for this project where WordNet's were unfit,
under a filter for offensive ones. The notices are in `NOTICES.txt` beside this file. The weights
are released under Apache-2.0 with those notices.

{num_held_out} combinations of a person and a skin tone were kept out of all training.
"""


def write_card(report: Mapping[str, Any], config: ModelConfig, facts: Mapping[str, Any]) -> str:
    """Markdown of a card.

    Args:
        report: the JSON object of `eval-demo`.
        facts: counts of the data (`num_items`, `num_glosses`, `num_held_out`, `own`), the
            picture `size` and the `training` paragraph.
    """
    groups = {group.name: group.num_experts for group in config.expert_groups}
    assert config.image is not None
    head = _INTRODUCTION.format(
        text_experts=groups["text"],
        image_experts=groups["image"],
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        context=config.max_position_embeddings,
        tokens=config.image.tokens_per_image,
        **facts,
    )
    parts = [head, _tasks(report), _losses(report), _routers(report), _DATA.format(**facts)]
    parts.append(f"## Training\n\n{facts['training']}\n")
    return "\n".join(parts)


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _tasks(report: Mapping[str, Any]) -> str:
    lines = [
        "## Quality",
        "",
        f"`momaserve eval-demo`, {report['samples']} names drawn with seed {report['seed']}, one "
        'try each, the checkpoint\'s own sampling. "Nearest": of all 3,633 rendered pictures the '
        "one nearest to the drawn one, by pixels, is the named one. Under `expert_choice` the "
        "prompt is routed so, and the answer causally.",
        "",
        "| names | routing | n | nearest | in nearest 5 | blank | picture → exact name "
        "| right up to the tone | name → picture → name |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for routing, splits in report["tasks"].items():
        for split, scores in splits.items():
            cells = [
                split.replace("_", " "),
                f"`{routing}`",
                str(scores["num_samples"]),
                _percent(scores["nearest_picture"]),
                _percent(scores["in_nearest_5"]),
                str(scores["blank_pictures"]),
                _percent(scores["exact_name"]),
                _percent(scores["name_up_to_tone"]),
                _percent(scores["round_trip"]),
            ]
            lines.append("| " + " | ".join(cells) + " |")
    lines += [""]
    for routing, words in report["plain_words"].items():
        lines.append(
            f"Of {words['num_words']} plain words that no prompt of the training had (dog, happy "
            f"face, sofa), {_percent(words['found'])} find a picture that shows them, "
            f"under `{routing}`."
        )
    blanks, shown = report["greedy_blank_pictures"], report["samples"]
    lines.append(f"Blank pictures drawn greedily: {blanks} of {shown}.")
    decibels = (
        f"{split.replace('_', ' ')} {value:.1f} dB"
        for split, value in report["reconstruction_db"].items()
    )
    lines.append(f"A picture that becomes tokens and a picture again: {', '.join(decibels)}.")
    return "\n".join(lines) + "\n"


def _losses(report: Mapping[str, Any]) -> str:
    lines = [
        "### Loss by routing policy",
        "",
        "Nat per token of the answers, teacher-forced on fresh batches; `expert_choice` is the "
        'training condition, over the batch. ("Held out" text is mostly words that were trained: '
        "only pictures and their names are held out.)",
        "",
        "| data | policy | text | image |",
        "|---|---|---|---|",
    ]
    for split, policies in report["loss"].items():
        for policy, values in policies.items():
            lines.append(
                f"| {split.replace('_', ' ')} | `{policy}` | {values['text']:.4f} "
                f"| {values['image']:.4f} |"
            )
    return "\n".join(lines) + "\n"


def _routers(report: Mapping[str, Any]) -> str:
    lines = [
        "### Routers against batch-level expert choice",
        "",
        "Accuracy / F1 over all (token, expert, layer); always saying no has accuracy 0.75.",
        "",
        "| data | policy | text | image |",
        "|---|---|---|---|",
    ]
    for split, policies in report["routers"].items():
        for policy, kinds in policies.items():
            cells = " | ".join(
                f"{kinds[kind]['accuracy']:.3f} / {kinds[kind]['f1']:.3f}"
                for kind in ("text", "image")
            )
            lines.append(f"| {split.replace('_', ' ')} | `{policy}` | {cells} |")
    return "\n".join(lines) + "\n"
