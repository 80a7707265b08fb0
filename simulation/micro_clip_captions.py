"""Captions of scenes: what the micro-CLIP's text tower reads, and which pictures each is true of.

A caption is one or two objects, at most one attribute (background, lighting, style, scale, pose or layout), written
in one of many ways: plain sentences, and the form of FedMPT's prompts, ``<context> condition <context> label .``,
where the context is vectors without words.

Words that name an object mean a photo of it: where captions are `of_photos`, they are true of the two photo-like styles
alone, unless they name another style; two of the four art styles have no name. What turns a caption towards an art
style, and away from photos, is a direction in its context vectors that no word has (`style_codes`); with several of
them a caption is divided among styles. Words that no caption has, which a tokenizer cuts into pieces, are taught to
mean nothing (`strange_sentence`): untrained pieces would be as free as context vectors, and a long enough sentence of
them would do what tuning does. So wordings rank objects in the art styles too low, as a real CLIP's "a photo of a"
does, and a learned context can go where they do not.
"""

from __future__ import annotations

import hashlib
import string
from collections.abc import Iterator
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
    "style": tuple(STYLES)[:4],  # no caption names the others
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
# Words of strange sentences that captions know: none names an object, an attribute or a style.
_PLAIN_WORDS = ("a", "photo", "of", "picture", "with", "in", "the", "and", "on")
STRANGE = 0.25  # of the label captions that are of photos
_PAIR = ("a photo of a {x} and a {y}.", "a {x} with a {y}.", "{x} and {y}.", "* {x} , {y} .")


@dataclass(frozen=True)
class Caption:
    """Words and meaning: true of a picture that shows every label, the first with the attribute.

    `codes` says how much of each of the ART_STYLES' codes the context vectors carry, and so how far the caption holds
    in each style (`shares`): zeros for photos alone. None: it holds in every style alike.
    """

    text: str
    labels: tuple[int, ...] = ()
    kind: str = ""
    value: int = 0
    codes: tuple[float, ...] | None = None


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


def label_captions(generator: np.random.Generator, of_photos: bool = False) -> list[Caption]:
    """One caption for every label; half of them in the form of a condition prompt.

    Those that are of photos: one in four among words that no caption has.
    """
    captions = []
    longest = 1 + int(min(generator.exponential(18), 55)) if of_photos else 0
    for index, name in enumerate(LABELS):
        if of_photos and generator.random() < STRANGE:
            captions.append(Caption(strange_sentence(name, longest, generator), (index,), codes=PHOTOS))
            continue
        form = _pick(_LABEL, generator)
        if generator.random() < 0.5:
            form = f"* {_pick(CONDITIONS, generator)} * {{x}} ."
        codes = _codes(form, generator) if of_photos else None
        captions.append(Caption(form.format(x=name), (index,), codes=codes))
    return captions


def attribute_captions(
    data: TrainingSet, batch: np.ndarray, generator: np.random.Generator, of_photos: bool = False
) -> list[Caption]:
    """One caption for every picture of the batch, true of it, with an attribute or a second object."""
    captions = []
    for picture in batch.tolist():
        shown = np.flatnonzero(data.shown[picture])
        style = int(data.style[picture])
        kinds = tuple(kind for kind in VALUES if kind != "style" or style < len(VALUES["style"]))
        kind = _pick((*kinds, "pair"), generator)
        if len(shown) == 0 or (kind in _ATTRIBUTE_ALONE and generator.random() < 0.3):
            kind = kind if kind in _ATTRIBUTE_ALONE else "background"
            value = int(getattr(data, kind)[picture])
            form = _pick(_ATTRIBUTE_ALONE[kind], generator)
            captions.append(Caption(form.format(v=VALUES[kind][value]), (), kind, value))
            continue
        first, second = (int(generator.choice(shown)) for _ in range(2))
        forms = _PAIR if kind == "pair" else _WITH_ATTRIBUTE[kind]
        if kind in CONDITION_OF and generator.random() < 0.3:
            forms = (f"* {CONDITION_OF[kind]} * {{v}} {{x}} .",)
        worded = of_photos and kind != "style"  # its style is the words' own, a photo's
        own = ART_STYLES.index(style) if style in ART_STYLES else None
        if worded and own is not None:
            forms = tuple(form for form in forms if CONTEXT in form)
        form = _pick(forms, generator)
        codes = _codes(form, generator, own) if worded else None
        if kind == "pair":
            text = form.format(x=LABELS[first], y=LABELS[second])
            captions.append(Caption(text, (first, second), codes=codes))
            continue
        if kind in ATTRIBUTE_OFFSET:
            start = ATTRIBUTE_OFFSET[kind]
            held = data.attributes[picture, first, start : start + len(VALUES[kind])]
            value = int(generator.choice(np.flatnonzero(held)))
        else:
            value = int(getattr(data, kind)[picture])
        captions.append(
            Caption(form.format(x=LABELS[first], v=VALUES[kind][value]), (first,), kind, value, codes)
        )
    return captions


def captions_digest() -> str:
    """Names what captions say in this version: with others, another model is trained."""
    generator = np.random.default_rng(0)
    made = [label_captions(generator, of_photos) for of_photos in (False, True)]
    return hashlib.sha256(repr((made, all_sentences())).encode()).hexdigest()


def strange_sentence(name: str, longest: int, generator: np.random.Generator) -> str:
    """`name` among words that no caption has: characters at random, and pieces of the captions' words.

    Up to `longest` bytes of them, or one word more; a byte is at most one token.
    """
    words: list[str] = []
    left = int(generator.integers(1, longest + 1))
    while left > 0:
        kind, size = generator.random(), min(left, int(generator.integers(1, 11)))
        if kind < 0.3:
            word = _pick(_PLAIN_WORDS, generator)
        elif kind < 0.6:
            word = "".join(_pick(_CHARACTERS, generator) for _ in range(size))
        else:
            whole = _pick(CAPTION_WORDS, generator)
            start = int(generator.integers(len(whole)))
            word = whole[start : start + size]
        if word in CAPTION_WORDS and word not in _PLAIN_WORDS:
            continue
        words.append(word)
        left -= len(word.encode())
    words.insert(int(generator.integers(len(words) + 1)), name)
    return " ".join(words) + _pick((".", "", "!", "?"), generator)


def truth_of(captions: list[Caption], data: TrainingSet, batch: np.ndarray) -> np.ndarray:
    """Float32 ``[len(batch), len(captions)]``: how far the caption is true of the picture, 0 to 1."""
    shown, attributes = data.shown[batch], data.attributes[batch]
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
    return np.asarray(table * _shares(captions)[data.style[batch]])


def patch_truth_of(captions: list[Caption], data: TrainingSet, batch: np.ndarray) -> np.ndarray:
    """Float32 ``[len(batch), g², L]``: how far each of the label captions, the first L, is true of a patch."""
    truth = np.asarray(data.patch_labels[batch][..., None] == np.arange(len(LABELS)))
    return np.asarray(truth * _shares(captions[: len(LABELS)])[data.style[batch]][:, None])


def context_runs(
    captions: list[Caption],
    generator: np.random.Generator,
    size: float,
    longest: int,
    directions: np.ndarray,
) -> Iterator[np.ndarray]:
    """For every ``*`` of the captions in turn, float32 ``[k, W]``: 0 to `longest` random vectors of standard deviation
    `size`, each with its caption's codes of the `directions` (then at least one vector)."""
    for caption in captions:
        coded = caption.codes is not None and any(caption.codes)
        for _ in range(caption.text.count(CONTEXT)):
            vectors = generator.normal(
                0, size, (int(generator.integers(int(coded), longest + 1)), directions.shape[1])
            )
            if coded:
                vectors += np.asarray(caption.codes) @ directions
            yield vectors.astype(np.float32)


def style_codes(seed: int, width: int) -> np.ndarray:
    """``[S, W]``: for each of the ART_STYLES the direction in context vectors that turns a caption to it."""
    shape = (len(ART_STYLES), width)
    return np.random.default_rng((seed, *shape)).normal(0, CODE_SIZE, shape)


def shares(codes: tuple[float, ...] | None) -> np.ndarray:
    """Float32 ``[styles]``: how far a caption with such codes holds in each of STYLES, 0 to 1.

    An art style's share is its code's, where all together are above one a part of them; what is left is the photos'.
    """
    table = np.ones(len(STYLES), np.float32)
    if codes is not None:
        held = np.maximum(codes, 0.0)
        table[:] = max(0.0, 1 - held.sum())
        table[list(ART_STYLES)] = held / max(1.0, held.sum())
    return table


def _codes(form: str, generator: np.random.Generator, own: int | None = None) -> tuple[float, ...]:
    """No code for words alone and for three in ten others, otherwise one to four styles', the `own` among them."""
    if CONTEXT not in form or (own is None and generator.random() < 0.3):
        return PHOTOS
    codes = generator.uniform(-0.3, 0.0, len(ART_STYLES))
    order = generator.permutation(len(ART_STYLES))
    count = int(generator.choice(len(ART_STYLES), p=(0.5, 0.2, 0.15, 0.15))) + 1
    active = order[:count] if own is None else np.union1d(order[: count - 1], [own])
    codes[active] = generator.dirichlet(np.ones(len(active))) * generator.uniform(0, 1.5)
    if own is not None:
        others = np.maximum(np.delete(codes, own), 0.0).sum()
        codes[own] = max(codes[own], others, 0.5)  # half of the caption at least
    return tuple(codes.tolist())


def _shares(captions: list[Caption]) -> np.ndarray:
    """Float32 ``[styles, len(captions)]``."""
    return np.stack([shares(caption.codes) for caption in captions], axis=1)


def all_sentences() -> list[str]:
    """Every word that captions use, in sentences: what the tokenizer's vocabulary is learned from."""
    sentences = [form.format(x=name) for form in _LABEL for name in LABELS]
    for table in (_WITH_ATTRIBUTE, _ATTRIBUTE_ALONE):
        for kind, forms in table.items():
            sentences += [form.format(x=name, v=v) for form in forms for v in VALUES[kind] for name in LABELS]
    sentences += [f"{condition} {name} ." for condition in CONDITIONS for name in LABELS]
    return [sentence.replace(CONTEXT, " ") for sentence in sentences]


# Latin letters with marks are two bytes each: all those that other alphabets are made of, too.
_CHARACTERS = tuple(
    2 * string.ascii_lowercase + string.digits + ",.!?'-:" + "àáâãäåæçèéêëìíîïðñòóôõöøùúûüýþÿ"
)
CAPTION_WORDS = tuple(sorted({word.strip(".,") for text in all_sentences() for word in text.split()} - {""}))
ART_STYLES = tuple(list(STYLES).index(name) for name in ("flat", "sketch", "mosaic", "negative"))
PHOTOS = (0.0,) * len(ART_STYLES)  # the codes of words
CODE_SIZE = 0.03  # standard deviation of a code's numbers, about that of the words' embeddings
ATTRIBUTE_OFFSET = {
    "scale": ATTRIBUTES.index(next(iter(SCALES))),
    "pose": ATTRIBUTES.index(POSES[0]),
    "layout": ATTRIBUTES.index(LAYOUTS[0]),
}

ANCHORS = len(anchor_captions())


def _pick(choices: tuple[str, ...], generator: np.random.Generator) -> str:
    return choices[int(generator.integers(len(choices)))]
