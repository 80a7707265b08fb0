"""What a ``tagger.onnx`` says of itself: one JSON text in the model's metadata, written and read here."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass

from fedmpt.protocol.errors import FedmptError
from fedmpt.protocol.manifest import BundleError, canonical_json, from_plain

FORMAT = "fedmpt-tagger"
VERSION = 1
METADATA_KEY = "fedmpt.tagger"
MAXIMUM_INFO_BYTES = 4 << 20

PREPROCESSING = (
    "apply the EXIF orientation, convert to RGB, resize the shorter side to image_size (bicubic, antialiased), "
    "cut out the centre square, keep uint8; the normalisation is inside the graph"
)


class TaggerError(FedmptError):
    """A file is no tagger, of another version, or its description does not fit its graph."""


@dataclass(frozen=True)
class Measurement:
    """Validation figures of the export; fractions between 0 and 1, None where not measured; no photos: none were.

    ``calibration_error_before`` and ``_after`` are expected calibration errors without and with the temperature;
    ``cost`` is the mean average precision lost to the reduced precision, ``reference`` against what. ``source``
    names the photos, ``rule`` says how the thresholds were chosen on them.
    """

    photos: int = 0
    source: str = ""
    map: float | None = None
    calibration_error_before: float | None = None
    calibration_error_after: float | None = None
    cost: float | None = None
    reference: str | None = None
    rule: str = ""


@dataclass(frozen=True)
class TaggerInfo:
    """Labels, thresholds, preprocessing and provenance of a tagger.

    A photo has label c if its probability is at least ``thresholds[c]``. Probabilities are
    ``sigmoid(logit / temperature)``. ``grid`` is (rows, columns) of the heat maps. ``provenance`` names the
    federation, rounds and whatever else the state file noted.
    """

    format: str
    version: int
    labels: tuple[str, ...]
    thresholds: tuple[float, ...]
    temperature: float
    image_size: int
    preprocessing: str
    grid: tuple[int, int]
    precision: str
    method: str
    clip: str
    licence: str
    state_digest: str
    bundle_digest: str
    provenance: Mapping[str, str]
    measurement: Measurement


def info_to_json(info: TaggerInfo) -> str:
    """The metadata text; the same description gives the same text."""
    return canonical_json(dataclasses.asdict(info)).decode()


def info_from_json(text: str, where: str) -> TaggerInfo:
    """Read and check the metadata text; ``where`` starts the text of errors.

    Raises:
        TaggerError: not a tagger's description, of another version, or inconsistent.
    """
    try:
        value = json.loads(text) if len(text) <= MAXIMUM_INFO_BYTES else None
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise TaggerError(f"{where}: its metadata describes no tagger; make it with `fedmpt export`")
    if value.get("version") != VERSION:
        raise TaggerError(
            f"{where}: tagger version {value.get('version')!r}, but this program reads {VERSION}; export it again"
        )
    try:
        info = from_plain(TaggerInfo, value, where)
    except BundleError as error:
        raise TaggerError(str(error)) from None
    if not info.labels or len(info.thresholds) != len(info.labels):
        raise TaggerError(f"{where}: {len(info.labels)} labels but {len(info.thresholds)} thresholds")
    if not 1 <= info.image_size <= 4096 or min(info.grid) < 1:
        raise TaggerError(f"{where}: image size {info.image_size} or grid {info.grid} is out of range")
    return info
