"""The micro-CLIP's training set on disk: pictures as one memory-mapped array, their true factors beside it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from fedmpt.protocol.files import write_atomically
from fedmpt.simulation.scenes import (
    LAYOUTS,
    POSES,
    SCALES,
    SIZE,
    Progress,
    SceneSet,
    SceneSpecification,
    draw_scenes,
)
from fedmpt.simulation.scenes_render import LIGHTINGS

CHUNK = 1000
PATCH = 16
GRID = SIZE // PATCH
ATTRIBUTES: tuple[str, ...] = (*SCALES, *POSES, *LAYOUTS)  # of single objects


@dataclass(frozen=True)
class TrainingSet:
    """n pictures; for every label whether it is shown, and with which object attributes."""

    pixels: np.ndarray  # uint8 [n, S, S, 3]
    shown: np.ndarray  # bool [n, L]
    attributes: np.ndarray  # bool [n, L, 9]: an object of this label is small, …, on the right
    background: np.ndarray  # int8 [n]
    lighting: np.ndarray  # int8 [n]
    style: np.ndarray  # int8 [n]
    patch_labels: np.ndarray  # int8 [n, g²]: the label on top at each patch, −1 for none

    @cached_property
    def easy(self) -> np.ndarray:
        """Indices of the pictures in daylight or at sunset that show objects, none of them small."""
        bright = self.lighting <= list(LIGHTINGS).index("sunset")
        small = self.attributes[..., ATTRIBUTES.index("small")].any(1)
        return np.flatnonzero(bright & self.shown.any(1) & ~small)


def render_training_set(
    folder: Path, specification: SceneSpecification, count: int, seed: int, progress: Progress | None = None
) -> TrainingSet:
    """Draw `count` pictures into `folder`, or open what lies there already; goes on after an interruption."""
    folder.mkdir(parents=True, exist_ok=True)
    done_file = folder / "done.json"
    first = hashlib.sha256(draw_scenes(specification, 1, seed).pixels.tobytes()).hexdigest()
    identity = {"count": count, "seed": seed, "specification": repr(specification), "first": first}
    done = 0
    if done_file.exists():
        found = json.loads(done_file.read_text("utf-8"))
        done = found.pop("done") if {k: found.get(k) for k in identity} == identity else 0
    mode = "r+" if done else "w+"
    labels = len(specification.labels)
    shapes = {
        "pixels": (np.uint8, (SIZE, SIZE, 3)),
        "attributes": (np.bool_, (labels, 1 + len(ATTRIBUTES))),
        "factors": (np.int8, (3,)),
        "patch_labels": (np.int8, (GRID * GRID,)),
    }
    arrays = {
        name: np.lib.format.open_memmap(folder / f"{name}.npy", mode, dtype, (count, *shape))
        for name, (dtype, shape) in shapes.items()
    }
    while done < count:
        scenes = draw_scenes(specification, min(CHUNK, count - done), seed, start=done)
        part = slice(done, done + len(scenes))
        arrays["pixels"][part] = scenes.pixels
        arrays["attributes"][part] = object_attributes(scenes)
        arrays["patch_labels"][part] = object_patches(scenes)
        arrays["factors"][part] = np.stack([scenes.background, scenes.lighting, scenes.style], axis=1)
        for array in arrays.values():
            array.flush()
        done = part.stop
        write_atomically(done_file, json.dumps({**identity, "done": done}).encode())
        if progress is not None:
            progress(done, count)
    attributes, (background, lighting, style) = arrays["attributes"], np.asarray(arrays["factors"]).T
    return TrainingSet(
        arrays["pixels"],
        attributes[..., 0],
        attributes[..., 1:],
        background,
        lighting,
        style,
        np.asarray(arrays["patch_labels"]),
    )


def object_attributes(scenes: SceneSet) -> np.ndarray:
    """Bool ``[n, L, 1 + 9]``: is the label shown, and is one of its objects small, …, on the right."""
    table = np.zeros((*scenes.truth.shape, 1 + len(ATTRIBUTES)), np.bool_)
    rows = scenes.objects[scenes.objects["label"] >= 0]
    table[rows["scene"], rows["label"], 0] = True
    offset = 1
    for name, values in (("scale", SCALES), ("pose", POSES), ("layout", LAYOUTS)):
        table[rows["scene"], rows["label"], offset + rows[name]] = True
        offset += len(values)
    return table


def object_patches(scenes: SceneSet) -> np.ndarray:
    """Int8 ``[n, g²]``: at each patch the label of the topmost object whose box holds the patch's centre.

    An object too small for that has the patch at its own centre.
    """
    table = np.full((len(scenes), GRID, GRID), -1, np.int8)
    for row in scenes.objects:  # in the order in which they were painted
        first = np.ceil((row["box"][:2] - PATCH / 2) / PATCH).astype(int)
        end = np.ceil((row["box"][2:] - PATCH / 2) / PATCH).astype(int)
        middle = (row["box"][:2] + row["box"][2:]) // 2 // PATCH
        first, end = np.minimum(first, middle), np.maximum(end, middle + 1)
        table[row["scene"], first[1] : end[1], first[0] : end[0]] = row["label"]
    return table.reshape(len(scenes), GRID * GRID)
