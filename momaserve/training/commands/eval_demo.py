"""`momaserve eval-demo`: the demo's quality, as its model card states it."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from momaserve.config import RoutingPolicy
from momaserve.demo import CHECKPOINT
from momaserve.environment import machine
from momaserve.llm import LLM
from momaserve.models.config import ModelConfig, read_json_object
from momaserve.models.moma import MomaModel
from momaserve.training.card import write_card
from momaserve.training.commands.common import set_threads
from momaserve.training.data import open_corpus
from momaserve.training.demo import (
    demo_data,
    load_image_tokenizer,
    rows_of_step,
    select_items,
)
from momaserve.training.demo_eval import (
    PictureIndex,
    contact_sheet,
    count_greedy_blanks,
    draw,
    sample_items,
    score_tasks,
    score_words,
)
from momaserve.training.dictionary.corpus import Corpus
from momaserve.training.dictionary.notices import collect_notices
from momaserve.training.dictionary.own_glosses import OWN_GLOSSES
from momaserve.training.evaluate import loss_by_policy, router_agreement
from momaserve.training.image_tokenizer import psnr
from momaserve.training.recipe import Recipe
from momaserve.training.run import write_atomically

RECONSTRUCTED = 512
"""Pictures of each split, at most, whose reconstruction is measured."""


def run(args: argparse.Namespace) -> int:
    """Print a table and, as the last line, one JSON object."""
    checkpoint: Path = args.checkpoint or CHECKPOINT
    recipe = Recipe.load(args.recipe)
    set_threads(args)
    corpus = open_corpus(args.data, recipe)
    index = PictureIndex(corpus)
    report: dict[str, Any] = {
        "checkpoint": checkpoint.name,
        "samples": args.samples,
        "seed": args.seed,
        "machine": machine(),
        "tasks": {},
        "plain_words": {},
    }
    llms: list[LLM] = []
    for routing in args.routing:
        options = _routing_options(RoutingPolicy(routing))
        # The losses are those of the torch module, whose weights a backend may give up.
        llms = llms[:1]  # those between are done with
        llm = LLM(checkpoint, dtype=args.dtype, keep_weights=bool(args.loss_batches), **options)
        llms.append(llm)
        report["tasks"][routing] = {}
        for split in ("train", "held_out"):
            items = sample_items(
                select_items(corpus, recipe.dictionary, split), args.samples, args.seed
            )
            started = time.perf_counter()
            scores = asdict(score_tasks(llm, corpus, index, items, args.seed))
            report["tasks"][routing][split] = scores
            _print_scores(f"{routing}, {split}", scores, time.perf_counter() - started)
        words = asdict(score_words(llm, corpus, index, args.seed))
        report["plain_words"][routing] = words
        print(f"\n{routing}, plain words: {100 * words['found']:.0f} % of {words['num_words']}")
        print("  missed: " + ", ".join(f"{w} ({found})" for w, found in words["missed"].items()))
    llm = llms[0]  # what follows is told of the first routing alone
    shown = sample_items(select_items(corpus, recipe.dictionary, "train"), args.samples, args.seed)
    report["greedy_blank_pictures"] = count_greedy_blanks(llm, shown)
    report["reconstruction_db"] = _reconstruction(checkpoint, recipe, corpus)
    print(f"\nblank pictures drawn greedily: {report['greedy_blank_pictures']} of {len(shown)}")
    for split, decibel in report["reconstruction_db"].items():
        print(f"reconstruction, {split}: {decibel:.1f} dB")
    if args.sheet is not None:
        items = sample_items(select_items(corpus, recipe.dictionary, "train"), 100, args.seed)
        drawn = draw(llm, [item.name for item in items], args.seed)
        contact_sheet(corpus, items, drawn).save(args.sheet)
    if args.loss_batches:
        report |= _losses(llm.engine.model, checkpoint, recipe, corpus, args.loss_batches)
    if args.card:
        _write_card(checkpoint, recipe, corpus, report)
    print(json.dumps(report))
    return 0


def _reconstruction(checkpoint: Path, recipe: Recipe, corpus: Corpus) -> dict[str, float]:
    """Mean peak signal-to-noise ratio in dB of decoded pictures, by split."""
    tokenizer = load_image_tokenizer(checkpoint / "image_tokenizer")
    found: dict[str, float] = {}
    for split in ("train", "held_out"):
        items = select_items(corpus, recipe.dictionary, split)[:RECONSTRUCTED]
        pictures = torch.from_numpy(corpus.pictures[[item.id for item in items]])
        found[split] = round(psnr(tokenizer, pictures), 2)
    return found


def _write_card(checkpoint: Path, recipe: Recipe, corpus: Corpus, report: dict[str, Any]) -> None:
    config = ModelConfig.load(checkpoint)
    stages = read_json_object(checkpoint / "training.json")
    minutes = ", ".join(
        f"{name} {' + '.join(f'{value:.0f}' for value in values)}"
        for name, values in minutes_by_stage(stages).items()
    )
    facts = {
        "num_items": len(select_items(corpus, recipe.dictionary, "train")),
        "num_held_out": len(select_items(corpus, recipe.dictionary, "held_out")),
        "num_glosses": len(corpus.glosses),
        "own": sum(word in OWN_GLOSSES for word, _ in corpus.glosses),
        "size": f"{corpus.pictures.shape[1]} x {corpus.pictures.shape[2]}",
        "training": f"`make demo` (recipe `demo`); minutes on one CPU thread of a shared "
        f"2-core machine: {minutes}. The configuration of every stage is in `training.json`.",
    }
    write_atomically(checkpoint / "README.md", write_card(report, config, facts))
    write_atomically(checkpoint / "NOTICES.txt", collect_notices())


def minutes_by_stage(stages: dict[str, Any]) -> dict[str, list[float]]:
    """By stage; pretraining has those of the runs that it went on from, in order."""
    found = {name: [stage["minutes"]] for name, stage in stages.items() if "minutes" in stage}
    while "began_with" in stages:
        stages = stages["began_with"]
        found["pretrain"].insert(0, stages["pretrain"]["minutes"])
    return found


def _routing_options(policy: RoutingPolicy) -> dict[str, RoutingPolicy]:
    """Expert choice needs the whole sequence, so answers are routed causally after it."""
    if policy is RoutingPolicy.EXPERT_CHOICE:
        return {"routing": RoutingPolicy.CAUSAL, "prompt_routing": policy}
    return {"routing": policy}


def _losses(
    model: MomaModel, checkpoint: Path, recipe: Recipe, corpus: Corpus, num_batches: int
) -> dict[str, Any]:
    """Loss by policy and agreement of routers, on batches that no training step saw."""
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    report: dict[str, Any] = {"loss": {}, "routers": {}}
    policies = [p for p in RoutingPolicy if model.missing_for(p) is None]
    for split in ("train", "held_out"):
        data = demo_data(recipe, corpus, checkpoint / "image_tokenizer", tokenizer, split)
        settings = replace(recipe.pretrain, seed=recipe.pretrain.seed + 1000)
        batches = [
            rows_of_step(settings, data.packer, data.tasks.draw, step)
            for step in range(num_batches)
        ]
        with torch.inference_mode():
            losses = loss_by_policy(model, batches, policies)
            agreement = router_agreement(model, batches)
        report["loss"][split] = losses
        report["routers"][split] = {
            policy: {
                kind: {"accuracy": round(a.accuracy, 4), "f1": round(a.f1, 4)}
                for kind, a in kinds.items()
            }
            for policy, kinds in agreement.items()
        }
        print(f"\n{split}: loss in nat per token, and routers against expert choice")
        for policy, values in losses.items():
            kinds = report["routers"][split].get(policy, {})
            text = "  ".join(f"{k} {v:.4f}" for k, v in values.items())
            routers = "  ".join(f"{k} {v['accuracy']:.3f}/{v['f1']:.3f}" for k, v in kinds.items())
            print(f"  {policy:14} {text}   accuracy/F1: {routers or '-'}")
    return report


def _print_scores(title: str, scores: dict[str, Any], seconds: float) -> None:
    print(f"\n{title} ({scores['num_samples']} items, {seconds:.0f} s)")
    for name, value in scores.items():
        if isinstance(value, float):
            print(f"  {name:18} {100 * value:5.1f} %")
    print(f"  {'blank_pictures':18} {scores['blank_pictures']:5d}")
