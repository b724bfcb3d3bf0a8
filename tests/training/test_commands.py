"""The training commands on a user's data, from texts and pictures to a served checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from momaserve.llm import LLM
from momaserve.models.config import ModelConfig
from momaserve.models.weights import load_model
from momaserve.sampling import SamplingParams
from momaserve.training.run import read_log
from momaserve_server.cli import main
from tests.training.user_data import write_captions, write_recipe, write_texts

CPU = torch.device("cpu")


def run(command: str, *words: str | Path) -> None:
    assert main([command, *map(str, words)]) == 0, command


def refused(capsys: pytest.CaptureFixture[str], command: str, *words: str | Path) -> str:
    """The one line that a mistake gets."""
    capsys.readouterr()
    assert main([command, *map(str, words)]) in (1, 2)
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith(f"momaserve {command}: error: ")
    return lines[-1]


def test_texts_become_a_served_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, recipe = write_texts(tmp_path), write_recipe(tmp_path / "r.toml")
    out = tmp_path / "mine"
    source = ("--recipe", recipe, "--data", data)
    run("train", *source, "--out", out)
    shown = capsys.readouterr()
    assert "`momaserve fit-routers" in shown.out
    assert "documents " in shown.err  # what the data holds, before training starts
    config = ModelConfig.load(out)
    assert config.image is None
    assert config.vocab_size == 300
    records = read_log(out / "run")
    assert {int(r["step"]) for r in records if "valid_text_nll" in r} == {4, 6}
    assert (out / "run" / "loss.png").exists()
    stored = json.loads((out / "run" / "run.json").read_text())
    assert stored["data"]["row_length"] == "48"
    before = (out / "model.safetensors").read_bytes()
    run("train", *source, "--out", out)  # it is finished: nothing changes
    assert (out / "model.safetensors").read_bytes() == before

    run("fit-routers", out, *source)
    stages = json.loads((out / "training.json").read_text())
    assert stages.keys() == {"pretrain", "routers"}
    answer = LLM(out, dtype="float32").generate("red apple", SamplingParams(max_tokens=4, seed=1))
    assert len(answer[0].choices[0].token_ids) <= 4
    assert not (out / "image_tokenizer").exists()
    assert not (out / "generation_config.json").exists()


def test_pictures_and_words_become_a_served_model(tmp_path: Path) -> None:
    data = write_captions(tmp_path / "data")
    recipe = write_recipe(tmp_path / "r.toml", has_pictures=True)
    source = ("--recipe", recipe, "--data", data)
    run("train-image-tokenizer", *source, "--out", tmp_path / "codes")
    pictures = ("--image-tokenizer", tmp_path / "codes")
    run("train", *source, *pictures, "--out", tmp_path / "mine")
    run("fit-routers", tmp_path / "mine", *source)
    config = ModelConfig.load(tmp_path / "mine")
    assert config.image is not None
    assert config.image.tokens_per_image == 4
    assert {"valid_image_nll", "image_affinity"} <= {
        name for record in read_log(tmp_path / "mine" / "run") for name in record
    }
    run("export", tmp_path / "mine", "--out", tmp_path / "out", "--dtype", "float32")
    llm = LLM(tmp_path / "out")
    found = llm.generate("red thing", llm.default_params(mode="image", max_tokens=6, seed=1))
    (picture,) = found[0].choices[0].parts
    assert not isinstance(picture, str)
    assert picture.size == (8, 8)


def test_a_seed_is_upcycled_and_a_checkpoint_trained_on(tmp_path: Path) -> None:
    data = write_captions(tmp_path / "data")
    small = write_recipe(tmp_path / "small.toml", experts=1, has_pictures=True)
    large = write_recipe(tmp_path / "large.toml", experts=4, has_pictures=True)
    run("train-image-tokenizer", "--recipe", small, "--data", data, "--out", tmp_path / "codes")
    words = ("--recipe", small, "--data", data, "--image-tokenizer", tmp_path / "codes")
    run("train", *words, "--out", tmp_path / "seed")

    # Tokenizers, and how much data was learnt, come with the seed.
    run("upcycle", tmp_path / "seed", "--recipe", large, "--data", data, "--out", tmp_path / "up")
    config = ModelConfig.load(tmp_path / "up")
    assert [group.num_experts for group in config.expert_groups] == [4, 4]
    model = load_model(tmp_path / "up", config, dtype=torch.float32, device=CPU)
    assert all(router.aux is None for router in model.routers())
    for name in ("tokenizer.json", "image_tokenizer/model.safetensors"):
        assert (tmp_path / "up" / name).read_bytes() == (tmp_path / "seed" / name).read_bytes()
    stored = json.loads((tmp_path / "up" / "run" / "run.json").read_text())
    assert stored["skip_steps"] == 6
    assert stored["training"]["router_noise"] == "gumbel"
    assert stored["origin"]["checkpoint"] == "seed"
    assert stored["origin"]["upcycled"]
    stages = json.loads((tmp_path / "up" / "training.json").read_text())
    assert stages["began_with"]["pretrain"]["training"]["num_steps"] == 6

    begin = ("--init", tmp_path / "up", "--skip-steps", "12")
    run("train", "--recipe", large, "--data", data, *begin, "--out", tmp_path / "more")
    stored = json.loads((tmp_path / "more" / "run" / "run.json").read_text())
    assert stored["skip_steps"] == 12
    assert stored["training"]["router_noise"] is None
    assert stored["origin"]["checkpoint"] == "up"


def test_mistakes_get_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, recipe = write_texts(tmp_path), write_recipe(tmp_path / "r.toml")
    both = write_recipe(tmp_path / "both.toml", has_pictures=True)
    out = ("--out", tmp_path / "out")
    source = ("--recipe", recipe, "--data", data)
    line = refused(capsys, "train", "--recipe", both, "--data", data, *out)
    assert "make one with `momaserve train-image-tokenizer`" in line
    line = refused(capsys, "train-image-tokenizer", *source, *out)
    assert "no section [image_tokenizer], which this command needs" in line
    line = refused(capsys, "train", "--recipe", "demo", "--data", tmp_path, *out)
    assert "give --image-tokenizer" in line
    assert "--skip-steps must be" in refused(capsys, "train", *source, *out, "--skip-steps", "-1")
    assert "--threads must be" in refused(capsys, "train", *source, *out, "--threads", "0")
    if not torch.cuda.is_available():
        assert "sees no GPU" in refused(capsys, "train", *source, *out, "--device", "cuda")
    short = tmp_path / "short.toml"
    short.write_text(recipe.read_text().replace("row_length = 48", "row_length = 65"))
    line = refused(capsys, "train", "--recipe", short, "--data", data, *out)
    assert "row_length is 65, but max_position_embeddings is 64" in line
    line = refused(capsys, "train", "--recipe", recipe, "--data", tmp_path / "nowhere", *out)
    assert "nowhere" in line
    line = refused(capsys, "upcycle", tmp_path, *source, *out)
    assert "give --skip-steps" in line
