"""The standard sets by name and seed: ``pretrain``, and a federation whose clients hold different spurious pairs."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from fedmpt.protocol.files import atomic_path, write_atomically
from fedmpt.simulation.scenes import (
    ConditionLink,
    LabelLink,
    Progress,
    SceneError,
    SceneSet,
    SceneSpecification,
    draw_scenes,
)
from fedmpt.simulation.scenes_render import BACKGROUNDS, LIGHTINGS
from fedmpt.simulation.sprites import LABELS, STYLES

FEDERATION_LABELS = LABELS[:20]  # VOC's
FEDERATION_STYLES = ("flat", "sketch", "mosaic", "negative")  # a client's own, in turn
OWN_STYLE = 0.5  # share of a client's pictures in its own style; the others are in the two common ones
# Training stage -> share of each style, in the order of STYLES.
PRETRAIN_STYLE_WEIGHTS = {
    1: (0.43, 0.43, 0.05, 0.03, 0.03, 0.03),
    2: (0.33, 0.33, 0.13, 0.08, 0.05, 0.08),
    3: (0.25, 0.25, 0.15, 0.15, 0.08, 0.12),
}
PAIRS_PER_CLIENT = 5
MARGINAL = 0.12  # of a label at a client
SOURCE_MARGINAL = 0.2  # of a planted pair's source, so that a client shows its pairs often
TEST_MARGINAL = 0.15  # of every label in the decorrelated sets


def pretrain_specification(stage: int = 3) -> SceneSpecification:
    """What the micro-CLIP learns on: all labels, independent.

    Earlier stages show the two common styles more; the first shows all lightings as often, and smaller objects.
    """
    specification = SceneSpecification(
        labels=LABELS,
        marginals=(0.05,) * len(LABELS),
        styles=tuple(zip(STYLES, PRETRAIN_STYLE_WEIGHTS[stage], strict=True)),
    )
    if stage > 1:
        return specification
    return replace(
        specification,
        lightings=tuple((name, 1.0) for name in LIGHTINGS),
        scales=(("small", 0.3), ("medium", 0.45), ("large", 0.25)),
    )


@dataclass(frozen=True)
class FederationPlan:
    """What every set of a federation is drawn from, and the ordered pairs (source, target) planted at each client."""

    clients: dict[str, SceneSpecification]
    decorrelated: SceneSpecification
    pairs: dict[str, tuple[tuple[str, str], ...]]


@dataclass(frozen=True)
class FederationSet:
    """The drawn sets: `correlated` mixes the clients' own distributions, the last two have independent labels."""

    plan: FederationPlan
    clients: dict[str, SceneSet]
    correlated: SceneSet
    decorrelated: SceneSet
    validation: SceneSet


def federation_plan(seed: int, clients: int = 4, strength: float = 0.9) -> FederationPlan:
    """Plant five ordered label pairs at each client, no pair at two clients.

    Where a pair's source is shown its target follows with probability `strength`, otherwise with 0.12; at 0.12 and
    below nothing is planted. The sources go with a background (three) or a lighting (two) by condition links of the
    same `strength`, of which the first that comes up decides: at 0.9, P(condition | source) is 0.91, 0.75 and 0.62 for
    the backgrounds in their order and 0.92 and 0.75 for the lightings (measured). Half of a client's pictures are in
    one of four art styles, by turns: a style of its own with up to four clients, shared by every fourth beyond.

    :raises SceneError: more clients than there are distinct pairs for
    """
    generator = np.random.default_rng((seed, clients))
    planted: dict[str, tuple[tuple[str, str], ...]] = {}
    specifications = {}
    styles = {f"client-{number + 1}": FEDERATION_STYLES[number % 4] for number in range(clients)}
    for name, style in styles.items():
        pairs = _new_pairs({pair for known in planted.values() for pair in known}, generator)
        planted[name] = pairs
        sources = [source for source, _ in pairs]
        places = [str(value) for value in generator.permutation(list(BACKGROUNDS))]
        lights = [str(value) for value in generator.permutation(list(LIGHTINGS))]
        linked = strength > MARGINAL
        specifications[name] = SceneSpecification(
            labels=FEDERATION_LABELS,
            marginals=tuple(SOURCE_MARGINAL if label in sources else MARGINAL for label in FEDERATION_LABELS),
            links=tuple(LabelLink(source, target, strength, MARGINAL) for source, target in pairs)
            if linked
            else (),
            condition_links=tuple(
                ConditionLink(label, factor, values.pop(), strength)
                for label, factor, values in zip(
                    sources,
                    ("background",) * 3 + ("lighting",) * 2,
                    (places,) * 3 + (lights,) * 2,
                    strict=True,
                )
            )
            if linked
            else (),
            styles=_styles([style]),
        )
    decorrelated = SceneSpecification(
        labels=FEDERATION_LABELS,
        marginals=(TEST_MARGINAL,) * len(FEDERATION_LABELS),
        styles=_styles(list(styles.values())),
    )
    return FederationPlan(specifications, decorrelated, planted)


def _styles(own: list[str]) -> tuple[tuple[str, float], ...]:
    common = tuple((name, (1 - OWN_STYLE) / 2) for name in ("rendered", "glossy"))
    return common + tuple((name, OWN_STYLE / len(own)) for name in own)


def _new_pairs(known: set[tuple[str, str]], generator: np.random.Generator) -> tuple[tuple[str, str], ...]:
    for _ in range(1000):
        names = [str(name) for name in generator.permutation(FEDERATION_LABELS)]
        pairs = tuple(
            zip(names[:PAIRS_PER_CLIENT], names[PAIRS_PER_CLIENT : 2 * PAIRS_PER_CLIENT], strict=True)
        )
        if not known & set(pairs):
            return pairs
    raise SceneError(f"no further {PAIRS_PER_CLIENT} distinct label pairs: ask for fewer clients")


def federation_set(
    seed: int,
    clients: int = 4,
    strength: float = 0.9,
    *,
    photos: int = 250,
    correlated: int = 300,
    decorrelated: int = 400,
    validation: int = 200,
    progress: Progress | None = None,
) -> FederationSet:
    """Draw a federation: `photos` pictures a client and the three shared sets."""
    plan = federation_plan(seed, clients, strength)
    total, done = photos * clients + correlated + decorrelated + validation, 0

    def draw(specification: SceneSpecification, count: int, stream: int) -> SceneSet:
        nonlocal done
        drawn = draw_scenes(specification, count, _stream_seed(seed, stream))
        done += count
        if progress is not None:
            progress(done, total)
        return drawn

    drawn = {
        name: draw(specification, photos, 100 + number)
        for number, (name, specification) in enumerate(plan.clients.items())
    }
    shares = [len(part) for part in np.array_split(np.arange(correlated), clients)]
    parts = [
        draw(specification, share, 10_000 + number)
        for number, (specification, share) in enumerate(zip(plan.clients.values(), shares, strict=True))
    ]
    return FederationSet(
        plan,
        drawn,
        concatenate(parts),
        draw(plan.decorrelated, decorrelated, 1),
        draw(plan.decorrelated, validation, 2),
    )


def _stream_seed(seed: int, stream: int) -> int:
    """A seed of its own for every set of every federation."""
    return int(np.random.SeedSequence((seed, stream)).generate_state(1)[0])


def concatenate(parts: list[SceneSet]) -> SceneSet:
    """Join sets of the same labels; the first one's specification stands for all."""
    starts = np.cumsum([0, *(len(part) for part in parts[:-1])])
    objects = [part.objects.copy() for part in parts]
    for rows, start in zip(objects, starts, strict=True):
        rows["scene"] += start

    def join(name: str) -> np.ndarray:
        return np.concatenate([getattr(part, name) for part in parts])

    return SceneSet(
        parts[0].specification,
        join("pixels"),
        join("labels"),
        join("truth"),
        join("background"),
        join("lighting"),
        join("style"),
        np.concatenate(objects),
    )


def encode_photos(scenes: SceneSet, quality: int = 90) -> dict[str, bytes]:
    """The set as files: JPEGs and ``labels.csv`` (columns path, labels and, where any label is unknown, unknown)."""
    names = scenes.specification.labels
    files: dict[str, bytes] = {}
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    with_unknown = bool((scenes.labels == -1).any())
    writer.writerow(["path", "labels", "unknown"] if with_unknown else ["path", "labels"])
    for k in range(len(scenes)):
        path = f"{k:05d}.jpg"
        row = [path] + [
            ";".join(name for name, value in zip(names, scenes.labels[k], strict=True) if value == wanted)
            for wanted in (1, -1)[: 1 + with_unknown]
        ]
        writer.writerow(row)
        buffer = io.BytesIO()
        Image.fromarray(scenes.pixels[k]).save(buffer, "JPEG", quality=quality)
        files[path] = buffer.getvalue()
    return {**files, "labels.csv": table.getvalue().encode("utf-8")}


def write_photo_folder(scenes: SceneSet, folder: Path, quality: int = 90) -> None:
    """Write a set as a photo folder; ``labels.csv`` comes last, so that a folder that has one is whole."""
    for name, content in encode_photos(scenes, quality).items():
        if name == "labels.csv":
            write_atomically(folder / name, content)
        else:
            with atomic_path(folder / name) as temporary:
                temporary.write_bytes(content)
