"""``tagger.onnx``: pixels to label probabilities in one self-contained graph, made with ``onnx`` alone."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from fedmpt.export.model_card import card_title, model_card
from fedmpt.export.tagger_graph import ExportError, State, compose_tagger, set_temperature
from fedmpt.export.tagger_precision import reduce_precision
from fedmpt.protocol.codec import state_digest
from fedmpt.protocol.files import atomic_path, write_atomically
from fedmpt.protocol.manifest import BundleManifest, load_manifest, verify_bundle
from fedmpt.protocol.tagger_info import (
    FORMAT,
    METADATA_KEY,
    PREPROCESSING,
    VERSION,
    Measurement,
    TaggerInfo,
    info_to_json,
)

MAXIMUM_BYTES = 2047 << 20  # of a protobuf message are 2 GiB


@dataclass(frozen=True)
class Calibration:
    """What validation data chose: one ``threshold`` per label and the ``temperature`` that divides the logits."""

    thresholds: Sequence[float]
    temperature: float = 1.0


def export_tagger(
    bundle: Path,
    state: State,
    out: Path,
    *,
    calibration: Calibration | None = None,
    heatmaps: bool = True,
    provenance: Mapping[str, str] | None = None,
    measurement: Measurement | None = None,
    precision: str = "float32",
    photos: Iterable[NDArray[np.uint8]] = (),
    measure: Callable[[Path, Path], tuple[Calibration, Measurement]] | None = None,
) -> TaggerInfo:
    """Write ``out``, and its model card beside it (see :func:`card_path`).

    The graph takes ``pixels`` uint8 ``[B, S, S, 3]`` and gives ``probabilities`` ``[B, C]`` and, if wanted,
    ``heatmaps`` ``[B, C, rows, columns]`` (per label, how the decision is spread over the photo; sums to 1).

    Args:
        bundle: folder with ``manifest.json``; every file is checked against its digest.
        state: the tuned tensors, exactly those that the manifest lists.
        out: the file to write; it replaces an older one only when it is whole and valid.
        calibration: thresholds and temperature; 0.5 for every label and 1 where None.
        heatmaps: whether the file has the second output.
        provenance: federation, rounds, … for the metadata and the card.
        measurement: validation figures for the metadata and the card.
        precision: ``float32``, ``float16`` or ``int8``.
        photos: batches uint8 ``[B, S, S, 3]`` on which int8 finds the ranges of activations.
        measure: given a float32 file and the one in ``precision``, both with ``calibration``, gives the calibration
            and the figures of the latter, which has logits of its own; or raises to refuse it.

    Raises:
        BundleError: the bundle is incomplete or altered.
        ExportError: the state does not fit the bundle, or the calibration its labels.
        PrecisionError: the precision cannot be had.
    """
    manifest = load_manifest(bundle)
    verify_bundle(bundle, manifest)
    check_state(state, manifest)
    info = describe(manifest, state, calibration, provenance, measurement)
    model = compose_tagger(bundle, manifest, state, info.temperature, heatmaps)
    if precision == "float32":
        save_tagger(model, info, out)
        return info
    with tempfile.TemporaryDirectory() as folder:
        exact, reduced = Path(folder) / "float32" / out.name, Path(folder) / precision / out.name
        save_tagger(model, info, exact)
        model = reduce_precision(model, precision, photos)
        if measure:
            save_tagger(model, dataclasses.replace(info, precision=precision), reduced)
            calibration, measurement = measure(exact, reduced)
        info = describe(manifest, state, calibration, provenance, measurement, precision)
        set_temperature(model, info.temperature)
    save_tagger(model, info, out)
    return info


def describe(
    manifest: BundleManifest,
    state: State,
    calibration: Calibration | None,
    provenance: Mapping[str, str] | None,
    measurement: Measurement | None,
    precision: str = "float32",
) -> TaggerInfo:
    """The metadata of a tagger.

    Raises:
        ExportError: thresholds or temperature are unusable.
    """
    calibration = calibration or Calibration([0.5] * len(manifest.labels))
    thresholds = tuple(float(threshold) for threshold in calibration.thresholds)
    if len(thresholds) != len(manifest.labels) or not all(0 <= value <= 1 for value in thresholds):
        raise ExportError(
            f"calibration: {len(thresholds)} thresholds; one between 0 and 1 is needed for each of the "
            f"{len(manifest.labels)} labels"
        )
    if not 0 < calibration.temperature < float("inf"):
        raise ExportError(f"calibration: temperature {calibration.temperature} is not positive and finite")
    return TaggerInfo(
        format=FORMAT,
        version=VERSION,
        labels=manifest.labels,
        thresholds=thresholds,
        temperature=float(calibration.temperature),
        image_size=manifest.clip.image_size,
        preprocessing=PREPROCESSING,
        grid=manifest.tokens.grid,
        precision=precision,
        method=manifest.method,
        clip=manifest.clip.name,
        licence=manifest.clip.licence,
        state_digest=state_digest(state),
        bundle_digest=manifest.digest,
        provenance=dict(provenance or {}),
        measurement=measurement or Measurement(),
    )


def check_state(state: State, manifest: BundleManifest) -> None:
    """Raise ExportError unless the state has exactly the manifest's tensors, finite."""
    if state.keys() != manifest.state.keys():
        raise ExportError(
            f"state: has {', '.join(sorted(state))}; method {manifest.method} of this bundle needs "
            f"{', '.join(sorted(manifest.state))}; give the state that was tuned with this bundle"
        )
    for name, spec in manifest.state.items():
        if tuple(state[name].shape) != spec.shape:
            raise ExportError(
                f"state: {name} has shape {tuple(state[name].shape)}, this bundle needs {spec.shape}"
            )
        if not np.isfinite(state[name]).all():
            raise ExportError(f"state: {name} has values that are not finite; take an earlier round's state")


def save_tagger(model: onnx.ModelProto, info: TaggerInfo, out: Path) -> None:
    """Write the checked model with its metadata, and the model card beside it.

    Raises:
        ExportError: more than one ONNX file can hold.
    """
    size = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    if size > MAXIMUM_BYTES:
        raise ExportError(
            f"{out}: {size >> 20} MB of weights, more than one ONNX file can hold ({MAXIMUM_BYTES >> 20} MB); "
            "use a smaller CLIP checkpoint"
        )
    helper.set_model_props(model, {METADATA_KEY: info_to_json(info)})
    model.doc_string = f"Tags photos with {len(info.labels)} labels; its model card lies beside it."
    with atomic_path(out) as temporary:
        onnx.save(model, temporary)
        onnx.checker.check_model(temporary, full_check=True)
    write_atomically(card_path(out), model_card(info, out.name, heatmaps=len(model.graph.output) > 1))


def card_path(out: Path) -> Path:
    """``model-card.md`` beside a tagger, or ``<tagger>.model-card.md`` where that file is another's."""
    usual = out.with_name("model-card.md")
    try:
        with usual.open(encoding="utf-8", errors="replace") as file:
            title = file.readline().rstrip("\n")
    except FileNotFoundError:
        return usual
    return usual if title == card_title(out.name) else out.with_name(f"{out.stem}.model-card.md")
