"""The objects of scenes: sprites cut from three sheets of openly licensed emoji art (see ``NOTICE``).

A *style* is an art together with a treatment. The three arts as they are drawn make three styles; the others are
treatments of an art that change its look but not its shape.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter, ImageOps

SPRITE_FOLDER = Path(__file__).parent / "data" / "sprites"
CELL = 96
COLUMNS = 12

_CATALOGUE = json.loads((SPRITE_FOLDER / "catalogue.json").read_text("utf-8"))
LABELS: tuple[str, ...] = tuple(dict.fromkeys(cell["label"] for cell in _CATALOGUE["cells"]))

Treatment = Callable[[Image.Image], Image.Image]


def _as_drawn(sprite: Image.Image) -> Image.Image:
    return sprite


def _sketch(sprite: Image.Image) -> Image.Image:
    """Pencil: pale grey tones under dark outlines."""
    grey = ImageOps.autocontrast(sprite.convert("L"))
    edges = grey.filter(ImageFilter.FIND_EDGES).filter(ImageFilter.GaussianBlur(0.8))
    tones = np.asarray(grey, np.float32) * 0.45 + 130 - np.asarray(edges, np.float32) * 1.6
    return _with_alpha_of(sprite, Image.fromarray(np.clip(tones, 0, 255).astype(np.uint8)).convert("RGB"))


def _mosaic(sprite: Image.Image) -> Image.Image:
    """Tiles: sixteen colours in blocks a twelfth of the object wide."""
    coarse = sprite.convert("RGBa").resize((12, 12), Image.Resampling.BOX).convert("RGBA")
    tiles = coarse.convert("RGB").quantize(16).convert("RGB")
    alpha = coarse.getchannel("A").point(lambda value: 255 if value > 90 else 0)
    tiles.putalpha(alpha)
    return tiles.resize(sprite.size, Image.Resampling.NEAREST)


def _negative(sprite: Image.Image) -> Image.Image:
    return _with_alpha_of(sprite, ImageOps.invert(sprite.convert("RGB")))


def _with_alpha_of(sprite: Image.Image, colours: Image.Image) -> Image.Image:
    colours.putalpha(sprite.getchannel("A"))
    return colours


# style -> (art, treatment)
STYLES: dict[str, tuple[str, Treatment]] = {
    "rendered": ("fluent", _as_drawn),
    "glossy": ("noto", _as_drawn),
    "flat": ("twemoji", _as_drawn),
    "sketch": ("noto", _sketch),
    "mosaic": ("fluent", _mosaic),
    "negative": ("twemoji", _negative),
}


@cache
def sprites(style: str) -> dict[str, tuple[Image.Image, ...]]:
    """Label -> its sprites in one style: RGBA, 96 x 96, the object touching two opposite edges."""
    art, treatment = STYLES[style]
    with Image.open(SPRITE_FOLDER / f"{art}.webp") as file:
        sheet = file.convert("RGBA")
    found: dict[str, list[Image.Image]] = {label: [] for label in LABELS}
    for index, cell in enumerate(_CATALOGUE["cells"]):
        left, top = index % COLUMNS * CELL, index // COLUMNS * CELL
        found[cell["label"]].append(treatment(sheet.crop((left, top, left + CELL, top + CELL))))
    return {label: tuple(variants) for label, variants in found.items()}
