"""Tiny training runs that a test can start in a process of their own and kill."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch._dynamo  # every optimizer imports it, in seconds: once for all processes
from torch import nn
from tqdm import tqdm

from momaserve.training.demo import rows_of_step
from momaserve.training.fit_routers import FitRoutersConfig, fit_routers
from momaserve.training.image_tokenizer import ImageTokenizerTraining, train_image_tokenizer
from momaserve.training.pretrain import PretrainConfig, pretrain
from momaserve.training.run import Run
from tests.training.factory import draw, make_packer, tiny_config, tiny_model

NUM_STEPS = 40
PRETRAIN = PretrainConfig(
    num_steps=NUM_STEPS,
    num_rows=2,
    row_length=30,
    conversation_every=3,
    save_every=3,
    log_every=1,
    validate_every=5,
    router_noise="gumbel",
)
CODES = ImageTokenizerTraining(
    model={
        "image_size": 8,
        "levels": (4, 4),
        "encoder_channels": (4, 8),
        "decoder_channels": (4, 8),
        "blocks_per_stage": 1,
    },
    num_steps=NUM_STEPS,
    batch_size=4,
    save_every=3,
    log_every=1,
)
ROUTERS = FitRoutersConfig(num_steps=NUM_STEPS, save_every=3, log_every=1)


def train(out: Path) -> nn.Module:
    config = tiny_config()
    packer = make_packer(config)
    fresh = replace(PRETRAIN, seed=9)
    return pretrain(
        config,
        PRETRAIN,
        lambda step: rows_of_step(PRETRAIN, packer, draw, step),
        out,
        validation=[rows_of_step(fresh, packer, draw, 1)],
    )


def fit(out: Path) -> nn.Module:
    config = tiny_config()
    packer = make_packer(config)
    out.mkdir(exist_ok=True)
    return fit_routers(
        tiny_model(config), ROUTERS, lambda step: rows_of_step(PRETRAIN, packer, draw, step), out
    )


def code(out: Path) -> nn.Module:
    rng = np.random.default_rng(0)
    pictures, others = (rng.integers(0, 256, (n, 8, 8, 3), dtype=np.uint8) for n in (12, 3))
    return train_image_tokenizer(CODES, pictures, others, out)


KINDS: Mapping[str, Callable[[Path], nn.Module]] = {
    "train": train,
    "fit-routers": fit,
    "train-image-tokenizer": code,
}
STATES = {"fit-routers": "run-routers"}


def state_of(kind: str, out: Path) -> Path:
    return out / STATES.get(kind, "run") / "state.safetensors"


class Victim:
    """A run in a process of its own. It waits for ever before it ends: only a kill ends it."""

    def __init__(self, kind: str, out: Path, stop_in_save: str = "") -> None:
        """`stop_in_save`: where the second save waits for ever, see `_stop_in_save`."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        self.connection, theirs = context.Pipe()
        self.process = context.Process(
            target=_run, args=(kind, out, theirs, stop_in_save), daemon=True
        )
        self.process.start()
        theirs.close()

    def wait_for(self, word: str, count: int = 1) -> None:
        """Until the run has said `word` so often: "logged" after each step, "saving"."""
        while count:
            count -= self.connection.recv() == word

    def kill(self) -> int | None:
        """SIGKILL; returns the exit code."""
        self.process.kill()
        self.process.join()
        self.connection.close()
        return self.process.exitcode


def _run(kind: str, out: Path, connection: Connection, stop_in_save: str) -> None:
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own is a semaphore that the kill would leave behind
    log = Run.log

    def told(run: Run, values: Mapping[str, float]) -> None:
        log(run, values)
        connection.send("logged")
        if run.step + 1 == NUM_STEPS:
            _wait_for_ever(connection)

    mock.patch.object(Run, "log", told).start()
    if stop_in_save:
        _stop_in_save(state_of(kind, out), connection, stop_in_save)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    KINDS[kind](out)


def _stop_in_save(state: Path, connection: Connection, where: str) -> None:
    """The second save writes half a file ("half"), or all of it, and stops "before" or "after"
    it takes the old one's place."""
    replace_file: Any = os.replace

    def stopping(source: Path, target: Path) -> None:
        is_second = target == state and state.exists()
        if is_second and where == "half":
            os.truncate(source, os.path.getsize(source) // 2)
        if is_second and where != "after":
            connection.send("saving")
            _wait_for_ever(connection)
        replace_file(source, target)
        if is_second:
            connection.send("saving")
            _wait_for_ever(connection)

    mock.patch.object(os, "replace", stopping).start()


def _wait_for_ever(connection: Connection) -> None:
    connection.recv()
