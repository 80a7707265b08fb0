"""What a scene shows: labels with their co-occurrence, conditions, styles and annotation, as one frozen description."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedmpt.protocol.errors import FedmptError
from fedmpt.simulation.scenes_render import BACKGROUNDS, LIGHTINGS
from fedmpt.simulation.sprites import LABELS, STYLES

SIZE = 112
# Longer side of the object as a share of the picture's.
SCALES: dict[str, tuple[float, float]] = {
    "small": (0.17, 0.27),
    "medium": (0.29, 0.44),
    "large": (0.48, 0.72),
}
POSES = ("upright", "tilted", "partial")
LAYOUTS = ("left", "centre", "right")

Weights = tuple[tuple[str, float], ...]


class SceneError(FedmptError):
    """A scene specification that cannot be drawn."""


@dataclass(frozen=True)
class LabelLink:
    """One entry of the co-occurrence matrix: P(target | source) and P(target | no source).

    Both hold as stated for a target with one source. Of several sources the largest `when_present` among those shown
    counts, and where none is shown the smallest `when_absent`: given one source, the others raise the target's share.
    """

    source: str
    target: str
    when_present: float
    when_absent: float


@dataclass(frozen=True)
class ConditionLink:
    """Where `label` is shown, `factor` (``background``, ``lighting`` or ``scale``) is `value` with `probability`.

    A picture has one background and one lighting, so links are tried in their order and the first whose label is shown
    and whose chance comes up decides: a later link holds as far as the earlier ones leave the picture to it. If none
    does, the value is drawn from the specification's weights, `value` among them, so that a link alone gives
    P(value | label) = probability + (1 − probability) · share of value; a probability of 0 is like no link. A scale is
    each object's own: one link a label.
    """

    label: str
    factor: str
    value: str
    probability: float


def links_from_matrix(
    labels: Sequence[str], when_present: np.ndarray, when_absent: np.ndarray
) -> tuple[LabelLink, ...]:
    """One link for each number off the diagonal of a co-occurrence matrix; the diagonal is 1 whatever it says.

    ``when_present[i, j]`` is P(label j | label i), NaN where there is no link; ``when_absent[i, j]``, P(label j | no
    label i), counts only where `when_present` is a number. Pictures have exactly these probabilities where no column
    holds two numbers off the diagonal (see :class:`LabelLink`). Numbers in circles, as at (i, j) and (j, i), cannot be
    drawn; what lies at NaN follows from the rest.
    """
    return tuple(
        LabelLink(labels[i], labels[j], float(when_present[i, j]), float(when_absent[i, j]))
        for i, j in np.argwhere(~np.isnan(when_present)).tolist()
        if i != j
    )


@dataclass(frozen=True)
class SceneSpecification:
    """What is drawn. `marginals` holds one probability per label; a link's target ignores its own.

    `distractors` is the mean number of further objects whose labels are not in `labels`. Annotation: a shown label
    goes `missing`, an absent one is claimed (`claimed`), any becomes `unknown`, each independently at its rate.
    """

    labels: tuple[str, ...] = LABELS
    marginals: tuple[float, ...] = (0.05,) * len(LABELS)
    links: tuple[LabelLink, ...] = ()
    condition_links: tuple[ConditionLink, ...] = ()
    backgrounds: Weights = tuple((name, 1.0) for name in BACKGROUNDS)
    lightings: Weights = (
        ("daylight", 0.4),
        ("sunset", 0.16),
        ("night", 0.11),
        ("fog", 0.11),
        ("rain", 0.11),
        ("snowfall", 0.11),
    )
    styles: Weights = (("rendered", 1.0), ("glossy", 1.0))
    scales: Weights = (("small", 0.2), ("medium", 0.5), ("large", 0.3))
    distractors: float = 0.0
    missing: float = 0.0
    claimed: float = 0.0
    unknown: float = 0.0
    size: int = SIZE

    def __post_init__(self) -> None:
        _check(self)


def drawing_order(spec: SceneSpecification) -> list[int]:
    """Label indices, every link's source before its target.

    :raises SceneError: the links form a circle
    """
    order: list[int] = []
    waiting = list(range(len(spec.labels)))
    while waiting:
        ready = [
            index
            for index in waiting
            if all(
                spec.labels.index(link.source) in order
                for link in spec.links
                if link.target == spec.labels[index]
            )
        ]
        if not ready:
            circle = ", ".join(spec.labels[index] for index in waiting)
            raise SceneError(f"the label links form a circle among {circle}: remove one of them")
        order += ready
        waiting = [index for index in waiting if index not in ready]
    return order


def _check(spec: SceneSpecification) -> None:
    known = {"background": tuple(BACKGROUNDS), "lighting": tuple(LIGHTINGS), "scale": tuple(SCALES)}
    for label in spec.labels:
        _require(label in LABELS, f"no sprite shows {label!r}: the labels are {', '.join(LABELS)}")
    _require(len(set(spec.labels)) == len(spec.labels), "a label is named twice")
    _require(
        len(spec.marginals) == len(spec.labels),
        f"{len(spec.marginals)} marginals for {len(spec.labels)} labels: give one each",
    )
    for link in spec.links:
        for name in (link.source, link.target):
            _require(name in spec.labels, f"a link names {name!r}, which is not among the labels")
        _require(link.source != link.target, f"a link joins {link.source!r} to itself")
    for rule in spec.condition_links:
        _require(rule.label in spec.labels, f"a condition link names {rule.label!r}, which is not a label")
        _require(rule.factor in known, f"a condition link names {rule.factor!r}: use {', '.join(known)}")
        _require(rule.value in known[rule.factor], f"{rule.factor} has no value {rule.value!r}")
    scaled = [rule.label for rule in spec.condition_links if rule.factor == "scale"]
    for label in spec.labels:
        _require(scaled.count(label) <= 1, f"two condition links give {label!r} a scale: keep one")
    for weights, names in (
        (spec.backgrounds, tuple(BACKGROUNDS)),
        (spec.lightings, tuple(LIGHTINGS)),
        (spec.styles, tuple(STYLES)),
        (spec.scales, tuple(SCALES)),
    ):
        for name, weight in weights:
            _require(name in names, f"no {name!r}: choose from {', '.join(names)}")
            _require(weight >= 0, f"the weight of {name!r} is negative")
        _require(sum(weight for _, weight in weights) > 0, "a list of weights adds up to nothing")
    rates = [*spec.marginals, spec.missing, spec.claimed, spec.unknown]
    rates += [p for link in spec.links for p in (link.when_present, link.when_absent)]
    rates += [rule.probability for rule in spec.condition_links]
    _require(all(0 <= rate <= 1 for rate in rates), "a probability lies outside 0 … 1")
    _require(spec.size >= 32, f"pictures of {spec.size} pixels are too small: at least 32")
    drawing_order(spec)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise SceneError(message)
