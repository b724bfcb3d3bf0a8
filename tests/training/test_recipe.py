"""Recipes: the shipped one loads, and what is misspelt is refused by name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from momaserve.errors import ConfigError
from momaserve.training.recipe import RECIPES, Recipe

SHIPPED = (RECIPES / "demo.toml").read_text(encoding="utf-8")


def load(directory: Path, text: str) -> Recipe:
    path = directory / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return Recipe.load(str(path))


def test_the_shipped_recipe_loads_by_name_and_by_path(tmp_path: Path) -> None:
    recipe = Recipe.load("demo")
    assert recipe == load(tmp_path, SHIPPED)
    assert recipe.image_decoder.decoder_only
    assert not recipe.image_tokenizer.decoder_only
    assert isinstance(recipe.data.kinds, tuple)
    positions = recipe.pretrain.num_rows * recipe.pretrain.row_length
    assert positions <= recipe.model["max_position_embeddings"]  # of a whole conversation


def test_a_recipe_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no recipe 'denmo'; shipped ones: \['demo'\]"):
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
        ("[image_decoder]", "[image_decoder]\nsteps = 3", "section image_decoder: unknown keys"),
        ('kinds = ["base", "flag", "keycap", "latin"]', "", "section data: "),
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
