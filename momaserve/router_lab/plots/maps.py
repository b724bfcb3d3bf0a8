"""Routing maps: which experts take which places of a picture, and where causal routing errs."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from momaserve.router_lab.plots.style import BLACK, EXPERT_COLOURS, RED, new_figure

_MAX_LAYERS = 6
_EMPTY, _RIGHT = "#ececec", "#b8b8b8"
_MISSED, _ADDED = RED, BLACK


def draw_routing(parts: Mapping[str, Any]) -> Any:
    """Two rows per picture: the oracle's choice, and what causal routing does otherwise.

    A place of a picture is cut into as many parts as there are experts.
    """
    pictures = parts.get("policies", {}).get("pictures") or []
    pictures = [picture for picture in pictures if picture["maps"]["expert_choice"]]
    sites = [] if not pictures else _sites(pictures[0]["maps"]["expert_choice"])
    if not sites:
        return None
    has_causal = "causal" in pictures[0]["maps"]
    lines = 2 if has_causal else 1
    figure = new_figure(1.35 * (len(sites) + 1), 1.38 * lines * len(pictures) + 0.7)
    grid = figure.subplots(lines * len(pictures), len(sites) + 1, squeeze=False)
    num_experts = 1
    for axes in grid.flat:
        axes.set_xticks([])
        axes.set_yticks([])
        axes.grid(False)
        for spine in axes.spines.values():
            spine.set_visible(False)
    for number, picture in enumerate(pictures):
        first = grid[lines * number]
        shown = Image.open(io.BytesIO(base64.b64decode(picture["png"]))).convert("RGB")
        first[0].imshow(np.asarray(shown))
        first[0].set_xlabel("expert choice →", fontsize=8)
        for column, site in enumerate(sites):
            wanted = picture["maps"]["expert_choice"].get(site)
            if wanted is None:
                continue
            num_experts = max(num_experts, max(wanted, default=0).bit_length())
            axes = first[column + 1]
            if number == 0:
                axes.set_title(f"layer {site.partition('.')[0]}")
    for number, picture in enumerate(pictures):
        for column, site in enumerate(sites):
            wanted = picture["maps"]["expert_choice"].get(site)
            if wanted is None:
                continue
            chosen = _bits(wanted, picture["grid"], num_experts)
            grid[lines * number][column + 1].imshow(_coloured(chosen), interpolation="nearest")
            given = picture["maps"].get("causal", {}).get(site)
            if given is not None:
                causal = _bits(given, picture["grid"], num_experts)
                below = grid[lines * number + 1][column + 1]
                below.imshow(_errors(chosen, causal), interpolation="nearest")
                wrong = (chosen != causal).mean()
                below.set_xlabel(f"{100 * wrong:.1f} % wrong", fontsize=7)
        if has_causal:
            grid[lines * number + 1][0].text(
                0.5,
                0.5,
                "causal routing\nagainst it",
                ha="center",
                va="center",
                transform=grid[lines * number + 1][0].transAxes,
                fontsize=8,
            )
    _legend(figure, num_experts, has_causal=has_causal)
    return figure


def _sites(maps: Mapping[str, Any]) -> list[str]:
    """Routers of experts, of evenly chosen layers where there are many."""
    sites = [name for name in maps if not name.endswith(".depth")]
    if len(sites) <= _MAX_LAYERS:
        return sites
    chosen = np.linspace(0, len(sites) - 1, _MAX_LAYERS).round().astype(int)
    return [sites[index] for index in chosen]


def _bits(words: Sequence[int], grid: Sequence[int], num_experts: int) -> NDArray[np.bool_]:
    """[rows, columns, E]."""
    flags = (np.array(words)[:, None] >> np.arange(num_experts)) & 1
    return flags.astype(bool).reshape(*grid, num_experts)


def _tiles(values: NDArray[Any]) -> NDArray[Any]:
    """[rows, columns, E, 3] -> an image in which a place has a tile for each expert."""
    rows, columns, experts, _ = values.shape
    side = int(np.ceil(np.sqrt(experts)))
    size = 5  # pixels of a tile; places are set apart by a white line
    place = side * size + 1
    image = np.ones((rows * place, columns * place, 3))
    for expert in range(experts):
        top, left = divmod(expert, side)
        for y in range(size):
            for x in range(size):
                image[top * size + y :: place, left * size + x :: place] = values[:, :, expert]
    return image


def _coloured(chosen: NDArray[np.bool_]) -> NDArray[Any]:
    colours = np.array([_rgb(EXPERT_COLOURS[e % 8]) for e in range(chosen.shape[2])])
    return _tiles(np.where(chosen[..., None], colours, _rgb(_EMPTY)))


def _errors(wanted: NDArray[np.bool_], given: NDArray[np.bool_]) -> NDArray[Any]:
    values = np.where((wanted & given)[..., None], _rgb(_RIGHT), _rgb(_EMPTY))
    values = np.where((wanted & ~given)[..., None], _rgb(_MISSED), values)
    return _tiles(np.where((~wanted & given)[..., None], _rgb(_ADDED), values))


def _rgb(colour: str) -> NDArray[np.float64]:
    return np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])


def _legend(figure: Any, num_experts: int, *, has_causal: bool) -> None:
    entries = [(EXPERT_COLOURS[e % 8], f"expert {e}") for e in range(num_experts)]
    if has_causal:
        entries += [(_RIGHT, "rightly selected"), (_MISSED, "missed"), (_ADDED, "wrongly added")]
    for colour, label in entries:
        figure.axes[0].plot([], [], "s", color=colour, label=label, markersize=7)
    figure.legend(loc="outside lower center", ncols=min(7, len(entries)), fontsize=8)
