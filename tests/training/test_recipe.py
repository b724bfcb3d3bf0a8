"""Recipes: the shipped one loads, and what is misspelt is refused by name."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from momaserve.errors import ConfigError
from momaserve.training.documents.settings import DocumentSettings
from momaserve.training.recipe import RECIPES, Recipe, needed

SHIPPED = (RECIPES / "demo.toml").read_text(encoding="utf-8")


def load(directory: Path, text: str) -> Recipe:
    path = directory / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return Recipe.load(str(path))


def test_the_shipped_recipe_loads_by_name_and_by_path(tmp_path: Path) -> None:
    recipe = Recipe.load("demo")
    assert recipe == load(tmp_path, SHIPPED)
    assert needed(recipe.image_decoder, "image_decoder").decoder_only
    assert not needed(recipe.image_tokenizer, "image_tokenizer").decoder_only
    assert isinstance(recipe.dictionary.kinds, tuple)
    positions = recipe.pretrain.num_rows * recipe.pretrain.row_length
    assert positions <= recipe.model["max_position_embeddings"]  # of a whole conversation


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_every_shipped_recipe_loads(path: Path) -> None:
    assert Recipe.load(path.stem) == Recipe.load(str(path))


@pytest.mark.parametrize("name", ["demo-second", "demo-third", "demo-fourth"])
def test_further_runs_of_the_demo_differ_in_their_schedule_alone(name: str) -> None:
    first, recipe = Recipe.load("demo"), Recipe.load(name)
    assert (recipe.model, recipe.picture_size) == (first.model, first.picture_size)
    assert recipe.dictionary == first.dictionary
    assert (
        replace(
            recipe.pretrain,
            num_steps=14000,
            learning_rate=3e-3,
            decay_from=0.4,
            text_loss_weight=2.0,
        )
        == first.pretrain
    )


def test_the_sibling_differs_in_depth_routers_and_length_alone() -> None:
    first, recipe = Recipe.load("demo"), Recipe.load("demo-depth")
    model = dict(recipe.model)
    assert model.pop("depth_routing") == {
        "layers": [0, 2, 4], "capacity": 0.25, "aux_hidden_size": 96,
    }  # fmt: skip
    assert model == first.model
    assert recipe.dictionary == first.dictionary
    assert recipe.pretrain == replace(first.pretrain, num_steps=5000)
    assert (recipe.routers, recipe.picture_size) == (first.routers, first.picture_size)


def test_a_recipe_that_extends_another_has_its_settings_but_for_its_own(tmp_path: Path) -> None:
    text = 'extends = "demo"\n[pretrain]\nnum_steps = 7\n[model]\nhead_dim = 64\n'
    first, mine = Recipe.load("demo"), load(tmp_path, text)
    assert mine.pretrain == replace(first.pretrain, num_steps=7)
    assert mine.model == {**first.model, "head_dim": 64}
    assert (mine.data, mine.routers, mine.generation) == (
        first.data,
        first.routers,
        first.generation,
    )
    (tmp_path / "further").mkdir()
    further = tmp_path / "further" / "further.toml"
    further.write_text('extends = "../mine.toml"\n[pretrain]\nseed = 8\n')
    assert Recipe.load(str(further)).pretrain == replace(first.pretrain, num_steps=7, seed=8)


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ('"mine.toml"', "extends itself"),
        ("3", "must be a name or a path"),
        ('"x"', "no recipe 'x'"),
    ],
)
def test_a_recipe_that_extends_nothing_that_there_is(
    tmp_path: Path, base: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, f"extends = {base}\n")


def test_a_recipe_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no recipe 'denmo'; shipped ones: .*'demo'"):
        Recipe.load("denmo")
    with pytest.raises(ConfigError, match="no recipe '.*nowhere.toml'"):
        Recipe.load(str(tmp_path / "nowhere.toml"))


def test_a_file_that_is_no_toml(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path, "[data\n")
    (tmp_path / "folder.toml").mkdir()
    with pytest.raises(ConfigError, match="cannot be read"):
        Recipe.load(str(tmp_path / "folder.toml"))
    (tmp_path / "latin.toml").write_bytes(b"# \xff")
    with pytest.raises(ConfigError, match="cannot be read"):
        Recipe.load(str(tmp_path / "latin.toml"))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[routers]", "[router]", "sections must be"),
        ("[data]", "[extra]\nx = 1\n[data]", "sections must be"),
        ("[pretrain]", "[pretrain]\nnum_step = 3", "section pretrain: unknown keys ['num_step']"),
        ("[routers]", "[routers]\ndecay = 3", "section routers: unknown keys ['decay']"),
        ("[data]", "[data]\nkind = 3", "section data: unknown keys ['kind']"),
        ("[data]", "[data]\nname_share = 0.5", "at most 1 together, got (0.6, 0.5)"),
        ("[image_decoder]", "[image_decoder]\nsteps = 3", "section image_decoder: unknown keys"),
        ("kinds = ", "# ", "section data: "),
    ],
)
def test_what_is_unknown_or_missing(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in SHIPPED
    with pytest.raises(ConfigError, match=re.escape(message)):
        load(tmp_path, SHIPPED.replace(old, new, 1))


@pytest.mark.parametrize("section", ["data", "routers", "model", "generation"])
def test_a_section_must_be_a_table(tmp_path: Path, section: str) -> None:
    names = ("data", "image_tokenizer", "image_decoder", "model", "pretrain", "routers")
    text = f"{section} = 3\n" + "".join(
        f"[{name}]\n{'kinds = []' if name == 'data' else ''}\n"
        for name in (*names, "generation")
        if name != section
    )
    with pytest.raises(ConfigError, match=f"section {section} must be a table, got int"):
        load(tmp_path, text)


DOCUMENTS = (RECIPES / "documents.toml").read_text(encoding="utf-8")


def test_the_recipe_for_documents() -> None:
    recipe = Recipe.load("documents")
    assert isinstance(recipe.data, DocumentSettings)
    assert recipe.data.row_length == recipe.pretrain.row_length == 512
    assert recipe.data.num_rows == recipe.pretrain.num_rows
    assert recipe.data.row_length <= recipe.model["max_position_embeddings"]
    assert recipe.image_decoder is None
    assert recipe.generation == {}
    with pytest.raises(ConfigError, match="works on the dictionary alone"):
        _ = recipe.dictionary


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('source = "documents"', 'source = "web"', 'must be "dictionary" or "documents"'),
        ('source = "documents"', "", "section data: unknown keys"),
        ("[data]", "[data]\nrow_length = 5", "['row_length'] belong into section pretrain"),
        ("validation_share = 0.02", "validation_share = 2.0", "validation_share must be in (0, 1)"),
        ("[data]", "[data]\nkinds = []", "section data: unknown keys ['kinds']"),
        ("num_steps = 10000", "num_steps = 0", "num_steps must be an integer >= 1"),
    ],
)
def test_what_is_wrong_with_a_recipe_for_documents(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    assert old in DOCUMENTS
    with pytest.raises(ConfigError, match=re.escape(message)):
        load(tmp_path, DOCUMENTS.replace(old, new, 1))


def test_sections_that_a_run_does_not_need_may_be_absent(tmp_path: Path) -> None:
    text = SHIPPED[: SHIPPED.index("[routers]")].replace("[image_decoder]", "[routers]")
    text = text.replace("learning_rate = 1.5e-3\ndecoder_only = true\n", "")
    recipe = load(tmp_path, text)
    assert recipe.image_decoder is None
    assert recipe.routers is not None
    with pytest.raises(ConfigError, match=r"no section \[image_decoder\]"):
        needed(recipe.image_decoder, "image_decoder")
