"""Rebuild the sprite sheets: ``python -m fedmpt.simulation.sprites_pack``.

Needs what the shipped package does not: ``npm`` (fetches Fluent Emoji 3D and Twemoji from its registry), Debian's
``fonts-noto-color-emoji`` and ``resvg-py``. Everything else reads the sheets that this writes to ``data/sprites/``.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fedmpt.simulation.sprites import CELL, COLUMNS, SPRITE_FOLDER

NOTO_FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
NOTO_STRIKE = 109  # the font's only bitmap size, in pixels per em
NPM_PACKAGES = {"fluent": "@lobehub/fluent-emoji-3d@1.1.0", "twemoji": "@twemoji/svg@15.0.0"}

# Object -> the emoji that show it. VOC's twenty names first, then frequent names of COCO.
EMOJI: dict[str, str] = {
    "aeroplane": "✈ 🛩",
    "bicycle": "🚲",
    "bird": "🐦 🦜 🦆",
    "boat": "⛵ 🚤",
    "bottle": "🍾 🧴",
    "bus": "🚌 🚍",
    "car": "🚗 🚙",
    "cat": "🐈 🐈‍⬛",
    "chair": "🪑",
    "cow": "🐄",
    "dining table": "🍽",
    "dog": "🐕 🐩 🐕‍🦺",
    "horse": "🐎",
    "motorbike": "🏍 🛵",
    "person": "🧍🏻 🧍🏽‍♀️ 🧍🏿‍♂️",
    "potted plant": "🪴",
    "sheep": "🐑 🐏",
    "sofa": "🛋",
    "train": "🚆 🚂",
    "tv monitor": "📺",
    "truck": "🚚 🚛",
    "traffic light": "🚦",
    "elephant": "🐘",
    "zebra": "🦓",
    "giraffe": "🦒",
    "backpack": "🎒",
    "umbrella": "☂",
    "handbag": "👜 👛",
    "suitcase": "🧳",
    "sports ball": "⚽ 🏀",
    "kite": "🪁",
    "wine glass": "🍷",
    "cup": "☕",
    "bowl": "🥣 🍜",
    "banana": "🍌",
    "apple": "🍎 🍏",
    "sandwich": "🥪",
    "orange": "🍊",
    "carrot": "🥕",
    "pizza": "🍕",
    "donut": "🍩",
    "cake": "🎂 🍰",
    "bed": "🛏",
    "laptop": "💻",
    "cell phone": "📱",
    "book": "📕 📘",
    "clock": "⏰ 🕰",
    "vase": "🏺",
    "scissors": "✂",
    "teddy bear": "🧸",
}


def main(argv: list[str] | None = None) -> int:
    """Fetch the art, draw one sheet per art and write the catalogue."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=SPRITE_FOLDER)
    out: Path = parser.parse_args(argv).out
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        arts: dict[str, Callable[[str], Image.Image]] = {
            "fluent": _fluent(_npm_files(NPM_PACKAGES["fluent"], Path(folder))),
            "noto": _noto,
            "twemoji": _twemoji(_npm_files(NPM_PACKAGES["twemoji"], Path(folder))),
        }
        cells = [(label, emoji) for label, variants in EMOJI.items() for emoji in variants.split()]
        for art, draw in arts.items():
            _write_sheet([draw(emoji) for _, emoji in cells], out / f"{art}.webp")
    catalogue = {"cell": CELL, "columns": COLUMNS, "cells": [{"label": la, "emoji": e} for la, e in cells]}
    (out / "catalogue.json").write_text(json.dumps(catalogue, ensure_ascii=False, indent=1) + "\n", "utf-8")
    return 0


def _write_sheet(sprites: list[Image.Image], path: Path) -> None:
    rows = -(-len(sprites) // COLUMNS)
    sheet = Image.new("RGBA", (COLUMNS * CELL, rows * CELL))
    for index, sprite in enumerate(sprites):
        fitted = _fit(sprite)
        left = index % COLUMNS * CELL + (CELL - fitted.width) // 2
        top = index // COLUMNS * CELL + (CELL - fitted.height) // 2
        sheet.paste(fitted, (left, top))
    sheet.save(path, quality=88, method=6, exact=False)


def _fit(sprite: Image.Image) -> Image.Image:
    """Crop to what is drawn and scale the longer side to the cell."""
    sprite = sprite.convert("RGBA")
    opaque = Image.fromarray(np.asarray(sprite)[..., 3] > 8)
    sprite = sprite.crop(opaque.getbbox())
    scale = CELL / max(sprite.size)
    size = (max(1, round(sprite.width * scale)), max(1, round(sprite.height * scale)))
    return sprite.resize(size, Image.Resampling.LANCZOS)


def _npm_files(package: str, folder: Path) -> dict[str, bytes]:
    """The files of an npm package by stem."""
    done = subprocess.run(
        ["npm", "pack", "--silent", package], cwd=folder, check=True, capture_output=True, text=True
    )
    with tarfile.open(folder / done.stdout.strip().splitlines()[-1]) as archive:
        members = [member for member in archive.getmembers() if member.name.endswith((".webp", ".svg"))]
        return {Path(member.name).stem: _bytes_of(archive, member) for member in members}


def _bytes_of(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    assert file is not None  # only regular files were chosen
    return file.read()


def _find(files: dict[str, bytes], emoji: str) -> bytes:
    """Packages differ in whether names carry the variation selector."""
    plain = "-".join(f"{ord(c):x}" for c in emoji if c != "\ufe0f")
    for name, content in files.items():
        if name.replace("-fe0f", "") == plain:
            return content
    raise KeyError(f"no picture of {emoji} ({plain})")


def _fluent(files: dict[str, bytes]) -> Callable[[str], Image.Image]:
    return lambda emoji: Image.open(io.BytesIO(_find(files, emoji)))


def _twemoji(files: dict[str, bytes]) -> Callable[[str], Image.Image]:
    def draw(emoji: str) -> Image.Image:
        import resvg_py

        svg = _find(files, emoji).decode("utf-8")
        return Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=256))))

    return draw


def _noto(emoji: str) -> Image.Image:
    font = ImageFont.truetype(str(NOTO_FONT), NOTO_STRIKE)
    picture = Image.new("RGBA", (420, 160))
    ImageDraw.Draw(picture).text((2, 2), emoji, font=font, embedded_color=True)
    if picture.getbbox() is None or picture.getbbox()[2] > 160:  # type: ignore[index]
        raise KeyError(f"{NOTO_FONT.name} does not draw {emoji} as one picture")
    return picture


if __name__ == "__main__":
    raise SystemExit(main())
