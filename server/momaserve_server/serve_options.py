"""Arguments of `momaserve serve`; `serving.py` carries it out."""

from __future__ import annotations

import argparse

from momaserve_server.cli_options import SERVE_OPTIONS, add_model_source, add_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_source(parser)
    add_options(parser, SERVE_OPTIONS)
