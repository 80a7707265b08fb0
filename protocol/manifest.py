"""``manifest.json`` of a federation bundle: what the graphs take and give, and how to train."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from fedmpt.protocol.errors import FedmptError
from fedmpt.protocol.files import sha256_file, write_atomically
from fedmpt.protocol.onnx_file import check_external_data
from fedmpt.protocol.text import quoted

FORMAT = "fedmpt-bundle"
VERSION = 1
MAXIMUM_MANIFEST_BYTES = 16 << 20

Record = TypeVar("Record")


class BundleError(FedmptError):
    """A bundle's manifest or file is missing, malformed, of another version or altered."""


@dataclass(frozen=True)
class TensorSpec:
    """One tensor: NumPy dtype name and shape; a string in the shape names a dynamic dimension."""

    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Graph:
    """One ONNX file of the bundle with its inputs and outputs by name."""

    file: str
    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]


@dataclass(frozen=True)
class Clip:
    """The frozen checkpoint: where it came from and its sizes; ``logit_scale`` is exponentiated."""

    name: str
    licence: str
    image_size: int
    patch_size: int
    width: int
    text_width: int
    logit_scale: float


@dataclass(frozen=True)
class Tokens:
    """Image tokens: ``kind`` plain, maskclip or clearclip; ``mode`` full or pooled.

    ``count`` is M, the class token included; ``grid`` is (rows, columns) of the patches; ``width`` is D.
    """

    kind: str
    mode: str
    count: int
    grid: tuple[int, int]
    width: int


@dataclass(frozen=True)
class Pooling:
    """How region similarities become one score per label: transport, softmax or max; τ, λ, iterations."""

    name: str
    tau: float
    reg: float
    iterations: int


@dataclass(frozen=True)
class Training:
    """The local training set-up that every client follows.

    Optimiser ``sgd`` or ``adamw``; ``scalar_rate_factor`` multiplies the learning rate of ``scale`` and
    ``bias``; ``gradient_clip`` bounds the global gradient norm (0: off); the gammas and ``clip`` are the
    asymmetric loss's; ``calibrate`` says whether round 0 fits ``scale`` and ``bias`` first.
    """

    optimizer: str
    learning_rate: float
    momentum: float
    weight_decay: float
    gradient_clip: float
    scalar_rate_factor: float
    batch_size: int
    epochs: int
    rounds: int
    calibrate: bool
    gamma_pos: float
    gamma_neg: float
    clip: float
    seed: int


@dataclass(frozen=True)
class BundleManifest:
    """All a site must know of a bundle. ``state`` lists the trained tensors; ``files`` their SHA-256."""

    format: str
    version: int
    method: str
    labels: tuple[str, ...]
    conditions: tuple[str, ...]
    clip: Clip
    tokens: Tokens
    pooling: Pooling
    training: Training
    precision: str
    state: Mapping[str, TensorSpec]
    graphs: Mapping[str, Graph]
    files: Mapping[str, str]

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON; it covers every file by way of ``files``."""
        return hashlib.sha256(canonical_json(dataclasses.asdict(self))).hexdigest()

    @property
    def encoder_digest(self) -> str:
        """What a feature cache depends on: the image encoder's file, alone."""
        return self.files[self.graphs["image_encoder"].file]


def canonical_json(value: Any) -> bytes:
    """JSON with sorted keys and no spaces, UTF-8: one byte string for one value."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


def from_plain(kind: type[Record], value: Any, where: str) -> Record:
    """Build a (nested) frozen dataclass from parsed JSON; unknown fields are ignored.

    A field with a default, which an earlier release did not write, may be missing.

    Raises:
        BundleError: a field is missing or of the wrong type; the text gives its place, starting at ``where``.
    """
    result: Record = _convert(kind, value, where)
    return result


def load_manifest(folder: Path) -> BundleManifest:
    """Read ``manifest.json`` of a bundle folder.

    Raises:
        BundleError: missing, too large, not JSON, of another format or version, or a field is wrong.
    """
    path = folder / "manifest.json"
    try:
        if path.stat().st_size > MAXIMUM_MANIFEST_BYTES:
            raise BundleError(
                f"{path}: larger than {MAXIMUM_MANIFEST_BYTES} bytes; this is no bundle manifest"
            )
        value = json.loads(path.read_bytes())
        canonical_json(value)  # what cannot be written again has no digest
    except FileNotFoundError:
        raise BundleError(f"{path}: not found; give the folder that `fedmpt bundle` wrote") from None
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(f"{path}: cannot be read as JSON ({error}); make the bundle again") from error
    if not isinstance(value, dict) or value.get("format") != FORMAT or value.get("version") != VERSION:
        raise BundleError(f"{path}: not a {FORMAT} of version {VERSION}; make the bundle with this version")
    manifest = from_plain(BundleManifest, value, str(path))
    for name in [*manifest.files, *(graph.file for graph in manifest.graphs.values())]:
        if Path(name).name != name or name in ("", ".", ".."):
            raise BundleError(f"{path}: file name {name!r} leaves the bundle folder; do not use this bundle")
    for graph in manifest.graphs.values():
        if graph.file not in manifest.files:
            raise BundleError(f"{path}: {graph.file} has no digest in it; do not use this bundle")
        if not graph.file.endswith(".onnx"):  # ONNX Runtime reads another format by another suffix
            raise BundleError(f"{path}: the graph {graph.file} is no .onnx file; do not use this bundle")
    return manifest


def save_manifest(folder: Path, manifest: BundleManifest) -> None:
    """Write ``manifest.json``, indented for people; the digest does not depend on the layout."""
    text = json.dumps(dataclasses.asdict(manifest), indent=1, ensure_ascii=False, allow_nan=False)
    write_atomically(folder / "manifest.json", text + "\n")


def verify_bundle(folder: Path, manifest: BundleManifest) -> None:
    """Check every file of the bundle against its digest, and that its graphs read no other files.

    Raises:
        BundleError: a file is missing or differs.
        OnnxFileError: a graph would read a file that is not of the bundle, or a link.
    """
    for name, expected in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise BundleError(f"{path}: missing from the bundle; copy the whole bundle folder again")
        if sha256_file(path) != expected:
            raise BundleError(f"{path}: differs from its digest in manifest.json; copy the bundle again")
    for graph in manifest.graphs.values():
        check_external_data(folder / graph.file, manifest.files)


_PLAIN = frozenset((str, int, float, bool))


@functools.cache
def _fields(kind: Any) -> dict[str, Any]:
    """A dataclass's fields with their types; slow to find out, and wanted for every message."""
    return typing.get_type_hints(kind)


@functools.cache
def _required(kind: Any) -> list[str]:
    missing = dataclasses.MISSING
    return [
        field.name for field in dataclasses.fields(kind) if field.default is missing is field.default_factory
    ]


@functools.cache
def _generic(kind: Any) -> tuple[Any, tuple[Any, ...]]:
    return typing.get_origin(kind), typing.get_args(kind)


def _convert(kind: Any, value: Any, where: str) -> Any:
    if type(value) is kind and kind in _PLAIN:
        return value
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise BundleError(f"{where}: expected an object")
        record: Any = kind
        fields = _fields(record)
        if not fields.keys() <= value.keys():
            if missing := [name for name in _required(record) if name not in value]:
                raise BundleError(f"{where}: missing {', '.join(missing)}")
            fields = {name: field for name, field in fields.items() if name in value}
        # Nearly all fields are plain and of the right type: thousands of headers a second are read here.
        converted = {
            name: item
            if type(item := value[name]) is field and field in _PLAIN
            else _convert(field, item, f"{where}: {name}")
            for name, field in fields.items()
        }
        return record(**converted)
    origin, kinds = _generic(kind)
    if origin is tuple:
        if not isinstance(value, list):
            raise BundleError(f"{where}: expected a list")
        if kinds[-1] is not Ellipsis and len(kinds) != len(value):
            raise BundleError(f"{where}: expected {len(kinds)} items, got {len(value)}")
        return tuple(
            _convert(kinds[0] if kinds[-1] is Ellipsis else kinds[index], item, f"{where}[{index}]")
            for index, item in enumerate(value)
        )
    if isinstance(origin, type) and issubclass(origin, Mapping):
        if not isinstance(value, dict):
            raise BundleError(f"{where}: expected an object")
        item_kind = kinds[1]
        return {
            key: item
            if type(item) is item_kind and item_kind in _PLAIN
            else _convert(item_kind, item, f"{where}[{quoted(key)}]")
            for key, item in value.items()
        }
    accepted = kinds if origin in (typing.Union, types.UnionType) else (kind,)
    if float in accepted and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, accepted) or (isinstance(value, bool) and bool not in accepted):
        names = " or ".join(item.__name__ for item in accepted)
        raise BundleError(f"{where}: expected {names}, got {type(value).__name__}")
    return value
