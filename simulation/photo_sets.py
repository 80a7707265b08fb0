"""The multi-label benchmarks as they are unpacked from their authors' archives: VOC 2007, COCO 2014, NUS-WIDE.

They only read annotations, with the readers of a site where there is one; NUS-WIDE's text lists are read here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

import numpy as np
from numpy.typing import NDArray

from fedmpt.edge_client.datasets import LabelledPhoto, read_coco, read_selection, read_voc
from fedmpt.edge_client.labels import LabelRules
from fedmpt.protocol.errors import FedmptError

# VOC's compressed names as words that CLIP's tokenizer knows; the names that are words stay.
VOC_NAMES = {
    "aeroplane": "aeroplane",
    "bicycle": "bicycle",
    "bird": "bird",
    "boat": "boat",
    "bottle": "bottle",
    "bus": "bus",
    "car": "car",
    "cat": "cat",
    "chair": "chair",
    "cow": "cow",
    "diningtable": "dining table",
    "dog": "dog",
    "horse": "horse",
    "motorbike": "motorbike",
    "person": "person",
    "pottedplant": "potted plant",
    "sheep": "sheep",
    "sofa": "sofa",
    "train": "train",
    "tvmonitor": "tv monitor",
}


class PhotoSetError(FedmptError):
    """A benchmark's folder is not as its authors pack it."""


@dataclass(frozen=True)
class PhotoSet:
    """A benchmark: label names, the photos to train with, and the photos to test with."""

    labels: tuple[str, ...]
    train: list[LabelledPhoto]
    test: list[LabelledPhoto]


def read_photo_set(name: str, root: Path) -> PhotoSet:
    """Read voc, coco or nus-wide from the folder that holds it.

    Raises:
        PhotoSetError: unknown name, or a file of the benchmark is missing or malformed.
        DatasetError: an annotation cannot be read.
    """
    if name not in READERS:
        raise PhotoSetError(f"photo set {name!r} is unknown; known: {', '.join(READERS)}")
    if not root.is_dir():
        raise PhotoSetError(f"{root}: no such folder; set `root` to where {name} is unpacked")
    return READERS[name](root)


def _voc_2007(root: Path) -> PhotoSet:
    """``VOCdevkit/VOC2007``: trains on trainval, tests on test; difficult objects count as present."""
    renamed = {old: new for old, new in VOC_NAMES.items() if old != new}
    rules = LabelRules(tuple(VOC_NAMES.values()), renamed)
    train, test = (
        read_voc(root, rules, selection=read_selection(root / "ImageSets" / "Main" / f"{split}.txt"))
        for split in ("trainval", "test")
    )
    return PhotoSet(tuple(VOC_NAMES.values()), train, test)


def _coco_2014(root: Path) -> PhotoSet:
    """``annotations/instances_{train,val}2014.json`` with the folders ``train2014`` and ``val2014``."""
    first = root / "annotations" / "instances_train2014.json"
    try:
        labels = tuple(category["name"] for category in json.loads(first.read_bytes())["categories"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PhotoSetError(f"{first}: cannot be read as COCO's instances ({error})") from error
    train, val = (
        read_coco(root / "annotations" / f"instances_{split}.json", root / split, LabelRules(labels))
        for split in ("train2014", "val2014")
    )
    return PhotoSet(labels, train, val)


def _nus_wide(root: Path) -> PhotoSet:
    """NUS-WIDE's 81 concepts: ``ConceptsList``, ``ImageList``, ``Groundtruth/TrainTestLabels``, ``Flickr``.

    Line k of every label file belongs to line k of the image list. Photos without any concept are left out, as
    the field does.
    """
    concepts = _lines(root / "ConceptsList" / "Concepts81.txt")
    parts = []
    for split in ("Train", "Test"):
        listing = root / "ImageList" / f"{split}Imagelist.txt"
        paths = [root / "Flickr" / Path(*PureWindowsPath(line).parts) for line in _lines(listing)]
        folder = root / "Groundtruth" / "TrainTestLabels"
        columns = [
            _flags(folder / f"Labels_{concept}_{split}.txt", len(paths), listing) for concept in concepts
        ]
        labels = np.stack(columns, axis=1)
        parts.append([LabelledPhoto(path, row) for path, row in zip(paths, labels, strict=True) if row.any()])
    return PhotoSet(tuple(concepts), parts[0], parts[1])


READERS: Mapping[str, Callable[[Path], PhotoSet]] = {
    "voc": _voc_2007,
    "coco": _coco_2014,
    "nus-wide": _nus_wide,
}


def _lines(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise PhotoSetError(f"{path}: cannot be read ({error}); unpack all of NUS-WIDE's archives") from error
    found = [line for line in lines if line]
    for line in found:
        parts = PureWindowsPath(line)
        if parts.is_absolute() or ".." in parts.parts:
            raise PhotoSetError(f"{path}: {line!r} leaves the photo set's folder")
    return found


def _flags(path: Path, count: int, listing: Path) -> NDArray[np.int8]:
    lines = _lines(path)
    if len(lines) != count or not set(lines) <= {"0", "1"}:
        raise PhotoSetError(f"{path}: expected {count} lines of 0 or 1, one for each line of {listing}")
    return np.array(lines, np.int8)
