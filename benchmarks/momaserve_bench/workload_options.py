"""Arguments that say what requests a benchmark makes. Imports nothing heavy."""

from __future__ import annotations

import argparse

FRACTIONS = (
    ("text", "have words in and out", "what the others leave"),
    ("image-output", "ask for one picture", "0"),
    ("image-input", "bring a picture and ask for words", "0"),
    ("shared-prefix", "begin with the same half of a prompt as one another", "0"),
)
SERVED_FRACTIONS = (
    ("probe", "ask for one token, for what a short request waits", "0"),
    ("cancel", "are closed by the client half way, probes aside", "0"),
)


def add_workload(parser: argparse.ArgumentParser, *, num_prompts: int, is_served: bool) -> None:
    """Adds the arguments that `WorkloadSpec.from_args` reads.

    Args:
        num_prompts: the default.
        is_served: whether requests go to a server, which makes probes and cancels possible.
    """
    for flag, help_, default in (
        ("--num-prompts", "requests", num_prompts),
        ("--input-len", "tokens of a prompt, or words where a picture is part of it", 32),
        ("--output-len", "tokens of an answer in words; a picture has its own number", 128),
        ("--seed", "of prompts, their order, arrivals and draws", 0),
    ):
        parser.add_argument(
            flag, type=int, default=default, metavar="N", help=f"{help_} (default: {default})"
        )
    fractions = (*FRACTIONS, *(SERVED_FRACTIONS if is_served else ()))
    for name, help_, shown in fractions:
        parser.add_argument(
            f"--{name}-fraction",
            type=float,
            default=None if name == "text" else 0.0,
            metavar="SHARE",
            help=f"share of the requests that {help_}, 0 to 1 (default: {shown})",
        )
