"""Scenes: seeded pictures of everyday objects whose generating factors are chosen and kept.

A :class:`SceneSpecification` says how often each label is shown, which labels and conditions go together and in
which style; :func:`draw_scenes` draws pictures from it. Picture number k depends on the specification, the seed and k
alone. NumPy and Pillow only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from fedmpt.simulation.scenes_render import BACKGROUNDS, LIGHTINGS, light, paint_background
from fedmpt.simulation.scenes_specification import (
    LAYOUTS,
    POSES,
    SCALES,
    SIZE,
    ConditionLink,
    LabelLink,
    SceneError,
    SceneSpecification,
    Weights,
    drawing_order,
    links_from_matrix,
)
from fedmpt.simulation.sprites import LABELS, STYLES, sprites

__all__ = [
    "LAYOUTS",
    "OBJECT",
    "POSES",
    "SCALES",
    "SIZE",
    "ConditionLink",
    "LabelLink",
    "Progress",
    "SceneError",
    "SceneSet",
    "SceneSpecification",
    "draw_scenes",
    "links_from_matrix",
]

Progress = Callable[[int, int | None], None]
# One row per drawn object; box in pixels (left, top, right, bottom), right and bottom exclusive.
OBJECT = np.dtype(
    [
        ("scene", np.int32),
        ("label", np.int16),  # index into the set's labels, −1 for a distractor
        ("box", np.int16, 4),
        ("visible", np.float32),  # share of the drawn object that is inside the picture and not covered
        ("scale", np.int8),
        ("pose", np.int8),
        ("layout", np.int8),
    ]
)


@dataclass(frozen=True)
class SceneSet:
    """n pictures with their labels and true factors (indices into the specification's names)."""

    specification: SceneSpecification
    pixels: np.ndarray  # uint8 [n, S, S, 3]
    labels: np.ndarray  # int8 [n, C] as annotated: 1, 0, −1 unknown
    truth: np.ndarray  # int8 [n, C] as shown: 1, 0
    background: np.ndarray  # int8 [n], index into BACKGROUNDS
    lighting: np.ndarray  # int8 [n], index into LIGHTINGS
    style: np.ndarray  # int8 [n], index into STYLES
    objects: np.ndarray  # OBJECT [k]

    def __len__(self) -> int:
        return len(self.pixels)

    def co_occurrence(self) -> np.ndarray:
        """What the pictures show: P(label j | label i) ``[C, C]``, NaN where no picture shows i."""
        shown = self.truth.astype(np.float64)
        together, alone = shown.T @ shown, shown.sum(0)[:, None]
        return np.asarray(np.divide(together, alone, out=np.full_like(together, np.nan), where=alone > 0))


def draw_scenes(
    specification: SceneSpecification,
    count: int,
    seed: int,
    *,
    start: int = 0,
    progress: Progress | None = None,
) -> SceneSet:
    """Draw pictures `start` … `start + count` of the endless series that `specification` and `seed` define."""
    spec = specification
    size = spec.size
    pixels = np.empty((count, size, size, 3), np.uint8)
    truth = np.zeros((count, len(spec.labels)), np.int8)
    labels = np.zeros_like(truth)
    factors = np.zeros((3, count), np.int8)
    objects: list[np.ndarray] = []
    order = drawing_order(spec)
    for k in range(count):
        generator = np.random.default_rng((seed, start + k))
        truth[k] = _draw_labels(spec, order, generator)
        labels[k] = _annotate(spec, truth[k], generator)
        pixels[k], factors[:, k], found = _draw_scene(spec, np.flatnonzero(truth[k]).tolist(), generator)
        found["scene"] = k
        objects.append(found)
        if progress is not None:
            progress(k + 1, count)
    rows = np.concatenate(objects) if objects else np.empty(0, OBJECT)
    return SceneSet(spec, pixels, labels, truth, factors[0], factors[1], factors[2], rows)


def _draw_labels(spec: SceneSpecification, order: list[int], generator: np.random.Generator) -> np.ndarray:
    """Ancestral sampling: a label without links from its marginal, a target from its sources.

    With several links to one target the largest probability among the present sources counts.
    """
    chance = generator.random(len(spec.labels))
    shown = np.zeros(len(spec.labels), np.int8)
    for index in order:
        name = spec.labels[index]
        links = [link for link in spec.links if link.target == name]
        probability = spec.marginals[index]
        if links:
            active = [li.when_present for li in links if shown[spec.labels.index(li.source)]]
            probability = max(active) if active else min(li.when_absent for li in links)
        shown[index] = chance[index] < probability
    return shown


def _annotate(spec: SceneSpecification, truth: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    chance = generator.random((2, len(truth)))
    flipped = chance[0] < np.where(truth == 1, spec.missing, spec.claimed)
    return np.where(chance[1] < spec.unknown, -1, truth ^ flipped).astype(np.int8)


def _choose(weights: Weights, generator: np.random.Generator) -> str:
    position = generator.random() * sum(weight for _, weight in weights)
    for name, weight in weights:
        position -= weight
        if position < 0:
            return name
    return weights[-1][0]


def _linked(
    spec: SceneSpecification, shown: list[str], factor: str, generator: np.random.Generator
) -> str | None:
    """The value that the first link whose label is shown and whose chance comes up asks for."""
    for link in spec.condition_links:
        if link.factor == factor and link.label in shown and generator.random() < link.probability:
            return link.value
    return None


def _draw_scene(
    spec: SceneSpecification, shown: list[int], generator: np.random.Generator
) -> tuple[np.ndarray, tuple[int, int, int], np.ndarray]:
    names = [spec.labels[index] for index in shown]
    background = _linked(spec, names, "background", generator) or _choose(spec.backgrounds, generator)
    lighting = _linked(spec, names, "lighting", generator) or _choose(spec.lightings, generator)
    style = _choose(spec.styles, generator)
    wanted = [(index, name) for index, name in zip(shown, names, strict=True)]
    wanted += [pair for pair in wanted if generator.random() < 0.12]  # now and then two of a kind
    others = [label for label in LABELS if label not in spec.labels]
    if others and spec.distractors:
        wanted += [
            (-1, others[i]) for i in generator.integers(0, len(others), generator.poisson(spec.distractors))
        ]
    picture = paint_background(background, spec.size, generator)
    objects = _place(spec, picture, wanted, style, generator)
    factors = (
        list(BACKGROUNDS).index(background),
        list(LIGHTINGS).index(lighting),
        list(STYLES).index(style),
    )
    return light(picture, lighting, generator), factors, objects


def _place(
    spec: SceneSpecification,
    picture: Image.Image,
    wanted: list[tuple[int, str]],
    style: str,
    generator: np.random.Generator,
) -> np.ndarray:
    """Paste the objects, the largest first, each at the least covered of six random places."""
    size = spec.size
    plans = []
    for index, name in wanted:
        only = [link for link in spec.condition_links if link.label == name and link.factor == "scale"]
        scale = _choose(spec.scales, generator)
        if only and generator.random() < only[0].probability:
            scale = only[0].value
        low, high = SCALES[scale]
        plans.append((generator.uniform(low, high) * size, index, name, scale))
    plans.sort(key=lambda plan: -plan[0])
    rows = np.zeros(len(plans), OBJECT)
    owner = Image.new("L", (size, size))
    areas = []
    taken: list[tuple[int, int, int, int]] = []
    for number, (side, index, name, scale) in enumerate(plans):
        pose = POSES[int(generator.choice(3, p=(0.6, 0.25, 0.15)))]
        sprite = _posed_sprite(style, name, side, pose, generator)
        box = _find_place(sprite.size, taken, size, pose == "partial", generator)
        taken.append(box)
        alpha = sprite.getchannel("A")
        shadow = alpha.point(lambda value: value * 2 // 5)
        picture.paste((12, 12, 18), (box[0] + 1, box[1] + 2), shadow)
        picture.paste(sprite, box[:2], alpha)
        owner.paste(number + 1, box[:2], alpha.point(lambda value: 255 if value > 127 else 0))
        areas.append(np.count_nonzero(np.asarray(alpha) > 127))
        inside = (max(box[0], 0), max(box[1], 0), min(box[2], size), min(box[3], size))
        layout = min(2, max(0, int((inside[0] + inside[2]) / 2 / size * 3)))
        rows[number] = (0, index, inside, 0.0, list(SCALES).index(scale), POSES.index(pose), layout)
    seen = np.bincount(np.asarray(owner).ravel(), minlength=len(plans) + 1)[1:]
    rows["visible"] = seen / np.maximum(areas, 1)
    return rows


def _posed_sprite(
    style: str, name: str, side: float, pose: str, generator: np.random.Generator
) -> Image.Image:
    variants = sprites(style)[name]
    sprite = variants[int(generator.integers(len(variants)))]
    target = max(6, round(side))
    sprite = sprite.resize((target, target), Image.Resampling.BILINEAR, reducing_gap=2.0)
    if generator.random() < 0.5:
        sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    sign = 1 if generator.random() < 0.5 else -1
    angle = generator.uniform(25, 60) * sign if pose == "tilted" else generator.uniform(0, 9) * sign
    sprite = sprite.rotate(angle, Image.Resampling.BILINEAR, expand=pose == "tilted")
    return sprite.crop(sprite.getchannel("A").getbbox())


def _find_place(
    extent: tuple[int, int],
    taken: list[tuple[int, int, int, int]],
    size: int,
    partial: bool,
    generator: np.random.Generator,
) -> tuple[int, int, int, int]:
    """The box, of six random ones, that covers least of `taken`; a `partial` object leaves the picture by a third."""
    width, height = extent
    best: tuple[float, tuple[int, int, int, int]] | None = None
    for across, down in generator.random((6, 2)).tolist():
        left, top = int(across * max(1, size - width)), int(down * max(1, size - height))
        if partial:
            left = (
                -int(width * (0.25 + 0.2 * down)) if across < 0.5 else size - int(width * (0.75 - 0.2 * down))
            )
        box = (left, top, left + width, top + height)
        covered = sum(_overlap(box, other) for other in taken)
        if best is None or covered < best[0]:
            best = (covered, box)
        if covered == 0:
            break
    assert best is not None
    return best[1]


def _overlap(one: tuple[int, int, int, int], two: tuple[int, int, int, int]) -> float:
    """Share of the smaller box that the other covers."""
    width = min(one[2], two[2]) - max(one[0], two[0])
    height = min(one[3], two[3]) - max(one[1], two[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, two)]
    return width * height / min(areas)
