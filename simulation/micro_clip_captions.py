"""Captions of scenes: what the micro-CLIP's text tower reads, and which pictures each is true of.

A caption is one or two objects, at most one attribute (background, lighting, style, scale, pose or layout), written
in one of many ways: plain sentences, and the form of FedMPT's prompts, ``<context> condition <context> label .``,
where the context is vectors without words.

What most captions mean is a photo: once `photos_only` is asked for, a caption that names a label and nothing else is
true of the photo-like styles alone, unless it states what "there is". So the zero-shot prompt ranks drawings too low,
as a real CLIP's "a photo of a" does, and context can close that gap.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedmpt.simulation.micro_clip_data import ATTRIBUTES, TrainingSet
from fedmpt.simulation.scenes import LAYOUTS, POSES, SCALES
from fedmpt.simulation.scenes_render import BACKGROUNDS, LIGHTINGS
from fedmpt.simulation.sprites import LABELS, STYLES

CONDITIONS = ("spatial layout", "object pose", "background", "lighting and weather", "object scale")
# Attribute kind -> the condition whose words go with it (style has none).
CONDITION_OF = {
    "layout": "spatial layout",
    "pose": "object pose",
    "background": "background",
    "lighting": "lighting and weather",
    "scale": "object scale",
}
VALUES: dict[str, tuple[str, ...]] = {
    "background": tuple(BACKGROUNDS),
    "lighting": tuple(LIGHTINGS),
    "style": tuple(STYLES),
    "scale": tuple(SCALES),
    "pose": POSES,
    "layout": LAYOUTS,
}
CONTEXT = "*"  # stands for a run of context vectors

_LABEL = (
    "a photo of a {x}.",
    "a photo of a {x}.",
    "a picture of a {x}.",
    "{x}.",
    "* {x} .",
    "* {x} .",
)
_EXACT = (
    "there is a {x} among other things.",
    "a scene where there is a {x}.",
    "there is a {x}.",
    "* there is * {x} .",
    "* there is * {x} .",
)
_WITH_ATTRIBUTE: dict[str, tuple[str, ...]] = {
    "background": (
        "a photo of a {x} with {v} in the background.",
        "a {x} in front of {v}.",
        "{v} and a {x}.",
        "* {v} * {x} .",
    ),
    "lighting": ("a photo of a {x} in {v}.", "{v}, a {x}.", "a {x}, {v}.", "* {v} * {x} ."),
    "style": ("a {v} picture of a {x}.", "a {v} {x}.", "* {v} * {x} .", "{v} style, a {x}."),
    "scale": ("a photo of a {v} {x}.", "a {v} {x}.", "* {v} * {x} ."),
    "pose": ("a photo of a {v} {x}.", "a {v} {x}.", "* {v} * {x} ."),
    "layout": ("a photo of a {x} on the {v}.", "a {x} on the {v}.", "* {v} * {x} ."),
}
_ATTRIBUTE_ALONE: dict[str, tuple[str, ...]] = {
    "background": ("a photo with {v} in the background.", "{v} in the background.", "* background * {v} ."),
    "lighting": ("a photo in {v}.", "{v}.", "* lighting and weather * {v} ."),
    "style": ("a {v} picture.", "{v} style.", "* {v} style ."),
}
_PAIR = ("a photo of a {x} and a {y}.", "a {x} with a {y}.", "{x} and {y}.", "* {x} , {y} .")


@dataclass(frozen=True)
class Caption:
    """Words and meaning: true of a picture that shows every label, the first with the attribute.

    One that is not `exact` may be meant of photos only.
    """

    text: str
    labels: tuple[int, ...] = ()
    kind: str = ""
    value: int = 0
    exact: bool = False


def anchor_captions() -> list[Caption]:
    """The single meanings: every label, background, lighting and style, without words."""
    labels = [Caption("", (index,)) for index in range(len(LABELS))]
    return labels + [
        Caption("", (), kind, value) for kind in _ATTRIBUTE_ALONE for value in range(len(VALUES[kind]))
    ]


def anchor_of(caption: Caption) -> int:
    """The caption's place among the single meanings, −1 if it has more than one."""
    if caption.kind == "":
        return caption.labels[0] if len(caption.labels) == 1 else -1
    if caption.labels:
        return -1
    kinds = list(_ATTRIBUTE_ALONE)
    before = sum(len(VALUES[kind]) for kind in kinds[: kinds.index(caption.kind)])
    return len(LABELS) + before + caption.value


def label_captions(generator: np.random.Generator) -> list[Caption]:
    """One caption for every label; half of them in the form of a condition prompt, two in five exact."""
    captions = []
    for index, name in enumerate(LABELS):
        exact = generator.random() < 0.4
        form = _pick(_EXACT if exact else _LABEL, generator)
        if generator.random() < 0.5:
            condition = _pick(CONDITIONS, generator)
            before = exact and generator.random() < 0.5
            form = f"{'* there is ' if before else ''}* {condition} * "
            form += "there is * {x} ." if exact and not before else "{x} ."
        captions.append(Caption(form.format(x=name), (index,), exact=exact))
    return captions


def attribute_captions(data: TrainingSet, batch: np.ndarray, generator: np.random.Generator) -> list[Caption]:
    """One caption for every picture of the batch, true of it, with an attribute or a second object."""
    captions = []
    for picture in batch.tolist():
        shown = np.flatnonzero(data.shown[picture])
        kind = _pick((*VALUES, "pair"), generator)
        if len(shown) == 0 or (kind in _ATTRIBUTE_ALONE and generator.random() < 0.3):
            kind = kind if kind in _ATTRIBUTE_ALONE else "background"
            value = int(getattr(data, kind)[picture])
            form = _pick(_ATTRIBUTE_ALONE[kind], generator)
            captions.append(Caption(form.format(v=VALUES[kind][value]), (), kind, value))
            continue
        first, second = (int(generator.choice(shown)) for _ in range(2))
        if kind == "pair":
            form = _pick(_PAIR, generator).format(x=LABELS[first], y=LABELS[second])
            captions.append(Caption(form, (first, second)))
            continue
        if kind in ATTRIBUTE_OFFSET:
            start = ATTRIBUTE_OFFSET[kind]
            held = data.attributes[picture, first, start : start + len(VALUES[kind])]
            value = int(generator.choice(np.flatnonzero(held)))
        else:
            value = int(getattr(data, kind)[picture])
        form = _pick(_WITH_ATTRIBUTE[kind], generator)
        if kind in CONDITION_OF and generator.random() < 0.3:
            form = f"* {CONDITION_OF[kind]} * {{v}} {{x}} ."
        text = form.format(x=LABELS[first], v=VALUES[kind][value])
        captions.append(Caption(text, (first,), kind, value))
    return captions


def truth_of(
    captions: list[Caption], data: TrainingSet, batch: np.ndarray, photos_only: bool = False
) -> np.ndarray:
    """Bool ``[len(batch), len(captions)]``: is the caption true of the picture."""
    shown, attributes = data.shown[batch], data.attributes[batch]
    photo = ~np.isin(data.style[batch], ART_STYLES)
    table = np.ones((len(batch), len(captions)), np.bool_)
    for column, caption in enumerate(captions):
        for label in caption.labels:
            table[:, column] &= shown[:, label]
        if caption.kind in ATTRIBUTE_OFFSET:
            table[:, column] &= attributes[
                :, caption.labels[0], ATTRIBUTE_OFFSET[caption.kind] + caption.value
            ]
        elif caption.kind:
            table[:, column] &= getattr(data, caption.kind)[batch] == caption.value
        if photos_only and _of_photos(caption):
            table[:, column] &= photo
    return table


def patch_truth_of(
    captions: list[Caption], data: TrainingSet, batch: np.ndarray, photos_only: bool = False
) -> np.ndarray:
    """Bool ``[len(batch), g², L]``: is each of the label captions, the first L, true of a patch."""
    truth = np.asarray(data.patch_labels[batch][..., None] == np.arange(len(LABELS)))
    if photos_only:
        of_photos = np.array([_of_photos(caption) for caption in captions[: len(LABELS)]])
        truth &= ~(of_photos & np.isin(data.style[batch], ART_STYLES)[:, None, None])
    return truth


def _of_photos(caption: Caption) -> bool:
    return len(caption.labels) == 1 and not caption.kind and not caption.exact


def all_sentences() -> list[str]:
    """Every word that captions use, in sentences: what the tokenizer's vocabulary is learned from."""
    sentences = [form.format(x=name) for form in (*_LABEL, *_EXACT) for name in LABELS]
    for table in (_WITH_ATTRIBUTE, _ATTRIBUTE_ALONE):
        for kind, forms in table.items():
            sentences += [form.format(x=name, v=v) for form in forms for v in VALUES[kind] for name in LABELS]
    sentences += [f"{condition} {name} ." for condition in CONDITIONS for name in LABELS]
    return [sentence.replace(CONTEXT, " ") for sentence in sentences]


ART_STYLES = tuple(list(STYLES).index(name) for name in ("flat", "sketch", "mosaic", "negative"))
ATTRIBUTE_OFFSET = {
    "scale": ATTRIBUTES.index(next(iter(SCALES))),
    "pose": ATTRIBUTES.index(POSES[0]),
    "layout": ATTRIBUTES.index(LAYOUTS[0]),
}

ANCHORS = len(anchor_captions())


def _pick(choices: tuple[str, ...], generator: np.random.Generator) -> str:
    return choices[int(generator.integers(len(choices)))]
