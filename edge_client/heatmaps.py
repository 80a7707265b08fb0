"""Region heat maps over photos: where in the picture a label's score came from."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fedmpt.edge_client.images import load_pixels
from fedmpt.edge_client.tagging import Tagged
from fedmpt.protocol.files import atomic_path

LONGEST_NAME = 255  # bytes; so on nearly every file system
# Colours from cold to hot, evenly spaced; the opacity rises with the heat so that the photo stays visible.
COLOURS = np.array([(40, 20, 90), (150, 30, 110), (235, 80, 50), (255, 170, 40), (255, 245, 120)], np.float64)
OPACITY = 0.75
DISTINCT = 0.25  # a map whose hottest patch is less than this above the average stays faint: it says little


def layer(heatmap: NDArray[np.floating], size: int) -> Image.Image:
    """A heat map as a transparent picture to lay over the photo's square crop: RGBA, ``size`` by ``size``.

    Args:
        heatmap: ``[rows, columns]``, not negative; only proportions matter. Full colour means the hottest patch,
            no colour the average or less.
        size: side of the picture in pixels.
    """
    heat = Image.fromarray(_intensity(heatmap)).resize((size, size), Image.Resampling.BICUBIC)
    intensity = np.clip(np.asarray(heat, np.float64), 0, 1)
    position = intensity * (len(COLOURS) - 1)
    stops = np.arange(len(COLOURS))
    channels = [np.interp(position, stops, COLOURS[:, channel]) for channel in range(3)]
    alpha = 255 * OPACITY * np.sqrt(intensity)
    return Image.fromarray(np.stack([*channels, alpha], axis=-1).round().astype(np.uint8))


def overlay(photo: NDArray[np.uint8] | Image.Image, heatmap: NDArray[np.floating]) -> Image.Image:
    """A square photo (``[S, S, 3]`` or a picture) with the heat map ``[rows, columns]`` laid over it, RGB."""
    picture = photo if isinstance(photo, Image.Image) else Image.fromarray(photo)
    return Image.alpha_composite(picture.convert("RGBA"), layer(heatmap, picture.width)).convert("RGB")


def write_explanations(folder: Path, result: Tagged, size: int) -> None:
    """Write ``<folder>/<path of the photo>.<label>.png``, ``size`` pixels square, for every label found.

    A name longer than a file system takes is shortened.

    Raises:
        OSError: a file cannot be written.
        PhotoError: the photo has gone since it was tagged.
    """
    if not result.heatmaps:
        return
    pixels = load_pixels(result.path, size)  # the model's own input is too coarse to look at
    parts = [part for part in result.path.parts if part not in (result.path.anchor, "..")]
    for label, heatmap in result.heatmaps.items():
        with atomic_path(folder.joinpath(*parts[:-1], _file_name(parts[-1], label))) as temporary:
            overlay(pixels, heatmap).save(temporary, "PNG")


def _file_name(photo: str, label: str) -> str:
    slug = re.sub(r"[^\w.-]+", "_", label)
    name = f"{photo}.{slug}.png"
    if len(os.fsencode(name)) <= LONGEST_NAME:
        return name
    digest = hashlib.sha256(os.fsencode(name)).hexdigest()[
        :8
    ]  # what is cut off may be all that tells two apart
    photo, slug = (os.fsencode(part)[:100].decode("utf-8", "ignore") for part in (photo, slug))
    return f"{photo}.{digest}.{slug}.png"


def _intensity(heatmap: NDArray[np.floating]) -> NDArray[np.float32]:
    heat = np.nan_to_num(np.asarray(heatmap, np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    above = heat / (heat.mean() or 1.0) - 1
    scale = max(float(above.max()), DISTINCT)
    return np.clip(above / scale, 0, 1).astype(np.float32)
