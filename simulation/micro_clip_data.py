"""The micro-CLIP's training set on disk: pictures as one memory-mapped array, their true factors beside it."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from fedmpt.protocol.files import write_atomically
from fedmpt.simulation.scenes import (
    LAYOUTS,
    POSES,
    SCALES,
    SIZE,
    SceneError,
    SceneSet,
    SceneSpecification,
    draw_scenes,
)
from fedmpt.simulation.scenes_render import LIGHTINGS

CHUNK = 1000
SPARE_BYTES = 300_000_000  # for what a training writes beside its scenes
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


@dataclass(frozen=True)
class SceneFolder:
    """A folder for a training set, and what the set is drawn from."""

    path: Path
    specification: SceneSpecification
    count: int
    seed: int

    @cached_property
    def identity(self) -> dict[str, object]:
        """What the pictures depend on; the first one stands for the code that draws."""
        first = hashlib.sha256(draw_scenes(self.specification, 1, self.seed).pixels.tobytes()).hexdigest()
        specification = repr(self.specification)
        return {"count": self.count, "seed": self.seed, "specification": specification, "first": first}

    @property
    def digest(self) -> str:
        """Of the identity, hexadecimal."""
        return hashlib.sha256(json.dumps(self.identity).encode()).hexdigest()

    def missing_bytes(self) -> int:
        """How much more disk the whole set takes.

        :raises SceneError: another set lies here, or a damaged one
        """
        each = sum(np.dtype(dtype).itemsize * math.prod(shape) for dtype, shape in self._layout().values())
        return each * (self.count - self._done())

    def render(self, progress: Callable[[int, int], None] | None = None) -> TrainingSet:
        """Draw the pictures, or open what lies here already; goes on after an interruption.

        :raises SceneError: another set lies here, or a damaged one
        """
        self.path.mkdir(parents=True, exist_ok=True)
        done = self._done()
        arrays = self._arrays("r+" if done else "w+")
        while done < self.count:
            scenes = draw_scenes(self.specification, min(CHUNK, self.count - done), self.seed, start=done)
            part = slice(done, done + len(scenes))
            arrays["pixels"][part] = scenes.pixels
            arrays["attributes"][part] = object_attributes(scenes)
            arrays["patch_labels"][part] = object_patches(scenes)
            arrays["factors"][part] = np.stack([scenes.background, scenes.lighting, scenes.style], axis=1)
            for array in arrays.values():
                array.flush()
            done = part.stop
            write_atomically(self._done_file, json.dumps({**self.identity, "done": done}))
            if progress is not None:
                progress(done, self.count)
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

    @property
    def _done_file(self) -> Path:
        return self.path / "done.json"

    def _layout(self) -> dict[str, tuple[type[np.generic], tuple[int, ...]]]:
        """What is kept of every picture: type and shape."""
        return {
            "pixels": (np.uint8, (SIZE, SIZE, 3)),
            "attributes": (np.bool_, (len(self.specification.labels), 1 + len(ATTRIBUTES))),
            "factors": (np.int8, (3,)),
            "patch_labels": (np.int8, (GRID * GRID,)),
        }

    def _arrays(self, mode: Literal["r", "r+", "w+"]) -> dict[str, np.memmap]:
        return {
            name: np.lib.format.open_memmap(self.path / f"{name}.npy", mode, dtype, (self.count, *shape))
            for name, (dtype, shape) in self._layout().items()
        }

    def _done(self) -> int:
        """How many pictures lie here, whole and drawn from the same."""
        if not self._done_file.exists():
            return 0
        try:
            found = json.loads(self._done_file.read_text("utf-8"))
            done = int(found.pop("done"))
            if found != self.identity:
                raise SceneError(f"{self.path}: holds other scenes; delete it or choose another folder")
            for name, array in self._arrays("r").items():
                dtype, shape = self._layout()[name]
                if array.dtype != np.dtype(dtype) or array.shape != (self.count, *shape):
                    raise ValueError(f"{name}.npy has another type or shape")
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise SceneError(
                f"{self.path}: its scenes are damaged ({error}); delete the folder, and they are drawn again"
            ) from error
        return done


def check_room(folder: Path, scenes: Sequence[SceneFolder]) -> None:
    """See that all that is missing of `scenes`, which lie in `folder`, has room on the disk.

    Memory maps take no room before they are written to, and on a full disk the process is killed then.

    :raises SceneError: too little room, or a set cannot be continued
    """
    missing = sum(each.missing_bytes() for each in scenes)
    if missing and (free := shutil.disk_usage(folder).free) < missing + SPARE_BYTES:
        raise SceneError(
            f"{folder}: the scenes need {(missing + SPARE_BYTES) / 1e9:.1f} GB more and {free / 1e9:.1f} GB are "
            "free; free some space or choose another folder"
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
