"""A data set's label names to the federation's labels: 1 present, 0 absent, −1 unknown."""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from fedmpt.protocol.errors import FedmptError

UNKNOWN = -1

Labels = npt.NDArray[np.int8]


class LabelError(FedmptError):
    """A data set uses label names that the federation does not have."""


@dataclass(frozen=True)
class LabelRules:
    """How names become labels.

    ``labels`` are the federation's, in order. ``mapping`` renames (``tvmonitor`` → ``tv``), ``ignored`` names are
    dropped on purpose, and ``ignore_others`` drops all that are no labels. ``unknown_as_negative`` takes every
    unknown label as absent (the paper's benchmark).
    """

    labels: Sequence[str]
    mapping: Mapping[str, str] = field(default_factory=dict)
    ignored: frozenset[str] = frozenset()
    ignore_others: bool = False
    unknown_as_negative: bool = False


def clean_name(name: str) -> str:
    """A label name without surrounding space, in Unicode's composed form."""
    return unicodedata.normalize("NFC", name).strip()


def resolve_names(names: Mapping[str, str], rules: LabelRules) -> dict[str, int | None]:
    """The label index of every name that a data set uses (``None``: ignored on purpose).

    ``names`` says of each where it was first used.

    Raises:
        LabelError: names that are neither labels nor mapped nor ignored, each with its nearest labels; or a
            mapping to something that is no label.
    """
    index = {clean_name(label): position for position, label in enumerate(rules.labels)}
    mapping = {clean_name(old): clean_name(new) for old, new in rules.mapping.items()}
    ignored = {clean_name(name) for name in rules.ignored}
    resolved: dict[str, int | None] = {}
    problems = [
        f"  --map {old}={new}: {_nearest(new, index)}" for old, new in mapping.items() if new not in index
    ]
    places = {clean_name(name): where for name, where in names.items()}
    for name, where in sorted(places.items()):
        target = mapping.get(name, name)
        if name in ignored:
            resolved[name] = None
        elif target in index:
            resolved[name] = index[target]
        elif name in mapping:
            continue  # the mapping's own problem, told above
        elif rules.ignore_others:
            resolved[name] = None
        else:
            problems.append(f"  {name!r}: {_nearest(name, index)} ({where})")
    if problems:
        raise LabelError(
            "these names are not labels of the federation; rename each with --map OLD=NEW "
            "or leave it out with --ignore-label NAME (all: --ignore-other-labels):\n" + "\n".join(problems)
        )
    return resolved


def encode_labels(
    present: Iterable[str], unknown: Iterable[str], resolved: Mapping[str, int | None], rules: LabelRules
) -> Labels:
    """One photo's labels, int8 ``[C]``; present wins over unknown, everything else is absent."""
    labels = np.zeros(len(rules.labels), np.int8)
    if not rules.unknown_as_negative:
        labels[_indices(unknown, resolved)] = UNKNOWN
    labels[_indices(present, resolved)] = 1
    return labels


def _indices(names: Iterable[str], resolved: Mapping[str, int | None]) -> list[int]:
    found = (resolved[clean_name(name)] for name in names)
    return [index for index in found if index is not None]


def _nearest(name: str, known: Iterable[str]) -> str:
    folded = {label.casefold(): label for label in known}
    near = difflib.get_close_matches(name.casefold(), folded, n=3)
    if near:
        return "nearest labels: " + ", ".join(folded[match] for match in near)
    return "no label is near"
