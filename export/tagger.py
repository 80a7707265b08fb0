"""``tagger.onnx``: pixels to label probabilities in one self-contained graph, made with ``onnx`` alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, compose, helper, numpy_helper

from fedmpt.export.model_card import model_card
from fedmpt.protocol.codec import state_digest
from fedmpt.protocol.errors import FedmptError
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

State = Mapping[str, NDArray[Any]]


class ExportError(FedmptError):
    """A tagger cannot be made of this bundle and state, or it would not be good enough."""


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
) -> TaggerInfo:
    """Write ``out`` (float32) and ``model-card.md`` beside it.

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

    Raises:
        BundleError: the bundle is incomplete or altered.
        ExportError: the state does not fit the bundle, or the calibration its labels.
    """
    manifest = load_manifest(bundle)
    verify_bundle(bundle, manifest)
    check_state(state, manifest)
    info = describe(manifest, state, calibration, provenance, measurement)
    save_tagger(compose_tagger(bundle, manifest, state, info.temperature, heatmaps), info, out)
    return info


def describe(
    manifest: BundleManifest,
    state: State,
    calibration: Calibration | None,
    provenance: Mapping[str, str] | None,
    measurement: Measurement | None,
    precision: str = "float32",
) -> TaggerInfo:
    """The tagger's metadata.

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
        measurement=measurement,
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


def compose_tagger(
    bundle: Path, manifest: BundleManifest, state: State, temperature: float, heatmaps: bool
) -> onnx.ModelProto:
    """Join image encoder, head, temperature and sigmoid; text features and state become constants."""
    encoder = onnx.load(bundle / manifest.graphs["image_encoder"].file)
    head = onnx.load(bundle / manifest.graphs["head"].file)
    text = text_features(bundle, manifest, state)
    constants = {"text": text, **{name: np.asarray(value, np.float32) for name, value in state.items()}}
    _fold_inputs(head.graph, constants)
    try:
        model = compose.merge_models(
            encoder, head, io_map=[("tokens", "tokens")], prefix1="encoder/", prefix2="head/"
        )
    except ValueError as error:
        raise ExportError(
            f"{bundle}: image encoder and head do not fit together ({error}); make the bundle again"
        ) from error
    graph = model.graph
    _rename(graph, {"encoder/pixels": "pixels"})
    graph.initializer.append(numpy_helper.from_array(np.float32(temperature), "temperature"))
    graph.node.append(helper.make_node("Div", ["head/logits", "temperature"], ["calibrated"], "calibrate"))
    graph.node.append(helper.make_node("Sigmoid", ["calibrated"], ["probabilities"], "probability"))
    labels = len(manifest.labels)
    outputs = [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["batch", labels])]
    if heatmaps:
        rows, columns = manifest.tokens.grid
        shape = np.array([0, labels, rows, columns], np.int64)  # 0 keeps the batch dimension
        graph.initializer.append(numpy_helper.from_array(shape, "heatmap_shape"))
        graph.node.append(
            helper.make_node("Reshape", ["head/plan", "heatmap_shape"], ["heatmaps"], "heatmap")
        )
        outputs.append(
            helper.make_tensor_value_info("heatmaps", TensorProto.FLOAT, ["batch", labels, rows, columns])
        )
    size = manifest.clip.image_size
    pixels = helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["batch", size, size, 3])
    _replace(graph.input, [pixels])
    _replace(graph.output, outputs)
    _cast_first(graph)
    _prune(graph)
    del model.opset_import[1:]  # the join lists the one operator set twice
    model.producer_name = "fedmpt"
    return model


def text_features(bundle: Path, manifest: BundleManifest, state: State) -> NDArray[np.float32]:
    """Run ``text_features.onnx`` once, with ONNX Runtime if installed, else with onnx's own evaluator."""
    graph = manifest.graphs["text_features"]
    inputs = {name: np.asarray(state[name], np.float32) for name in graph.inputs}
    path = bundle / graph.file
    try:
        import onnxruntime
    except ModuleNotFoundError:
        from onnx.reference import ReferenceEvaluator

        outputs = ReferenceEvaluator(str(path)).run(["text"], inputs)
    else:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        outputs = session.run(["text"], inputs)
    text: NDArray[np.float32] = outputs[0]
    if not np.isfinite(text).all():
        raise ExportError("state: its text features are not finite; take an earlier round's state")
    return text


def save_tagger(model: onnx.ModelProto, info: TaggerInfo, out: Path) -> None:
    """Write the checked model with its metadata, and the model card beside it."""
    helper.set_model_props(model, {METADATA_KEY: info_to_json(info)})
    model.doc_string = f"Tags photos with {len(info.labels)} labels; see model-card.md."
    with atomic_path(out) as temporary:
        onnx.save(model, temporary)
        onnx.checker.check_model(temporary, full_check=True)
    write_atomically(out.with_name("model-card.md"), model_card(info, out.name))


def _fold_inputs(graph: onnx.GraphProto, constants: Mapping[str, NDArray[np.float32]]) -> None:
    for value in [value for value in graph.input if value.name in constants]:
        graph.initializer.append(
            numpy_helper.from_array(np.ascontiguousarray(constants[value.name]), value.name)
        )
        graph.input.remove(value)


def _rename(graph: onnx.GraphProto, names: Mapping[str, str]) -> None:
    for node in graph.node:
        for index, name in enumerate(node.input):
            if name in names:
                node.input[index] = names[name]


def _cast_first(graph: onnx.GraphProto) -> None:
    """Let only the cast read the uint8 input: TensorRT takes uint8 at the border and nowhere else."""
    cast = next(node for node in graph.node if node.op_type == "Cast" and node.input[0] == "pixels")
    first = onnx.NodeProto.FromString(cast.SerializeToString())
    graph.node.remove(cast)
    _rename(graph, {"pixels": first.output[0]})
    graph.node.insert(0, first)


def _replace(field: Any, values: Sequence[Any]) -> None:
    del field[:]
    field.extend(values)


def _prune(graph: onnx.GraphProto) -> None:
    """Drop nodes, initialisers and shape notes that no output needs; node order (topological) stays."""
    needed = {value.name for value in graph.output}
    kept = []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            kept.append(node)
            needed.update(node.input)
    _replace(graph.node, kept[::-1])
    _replace(graph.initializer, [tensor for tensor in graph.initializer if tensor.name in needed])
    del graph.value_info[:]
