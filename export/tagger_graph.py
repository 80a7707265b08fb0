"""The tagger's graph: image encoder and head joined, and everything computed that depends on no photo."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, compose, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from fedmpt.protocol.errors import FedmptError
from fedmpt.protocol.manifest import BundleManifest
from fedmpt.protocol.onnx_file import check_external_data

State = Mapping[str, NDArray[Any]]

TEMPERATURE = "temperature"  # name of the constant


class ExportError(FedmptError):
    """A tagger cannot be made of this bundle and state, or it would not be good enough."""


def compose_tagger(
    bundle: Path, manifest: BundleManifest, state: State, temperature: float, heatmaps: bool
) -> onnx.ModelProto:
    """Join image encoder, head, temperature and sigmoid; text features and state become constants."""
    encoder, head = (_load(bundle, manifest, name) for name in ("image_encoder", "head"))
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
    graph.initializer.append(numpy_helper.from_array(np.float32(temperature), TEMPERATURE))
    graph.node.append(helper.make_node("Div", ["head/logits", TEMPERATURE], ["calibrated"], "calibrate"))
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
    replace(graph.input, [pixels])
    replace(graph.output, outputs)
    _cast_first(graph)
    _fold_constants(model)
    _prune(graph)
    del model.opset_import[1:]  # the join lists the one operator set twice
    model.producer_name = "fedmpt"
    return model


def set_temperature(model: onnx.ModelProto, temperature: float) -> None:
    """Let another temperature divide the logits of a composed tagger."""
    (constant,) = (tensor for tensor in model.graph.initializer if tensor.name == TEMPERATURE)
    constant.CopyFrom(numpy_helper.from_array(np.float32(temperature), TEMPERATURE))


def text_features(bundle: Path, manifest: BundleManifest, state: State) -> NDArray[np.float32]:
    """Run ``text_features.onnx`` once, with ONNX Runtime if installed, else with onnx's own evaluator."""
    graph = manifest.graphs["text_features"]
    inputs = {name: np.asarray(state[name], np.float32) for name in graph.inputs}
    path = bundle / graph.file
    check_external_data(path, manifest.files)
    try:
        import onnxruntime
    except ModuleNotFoundError:
        session: Any = ReferenceEvaluator(str(path))
    else:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    text: NDArray[np.float32] = session.run(["text"], inputs)[0]
    if not np.isfinite(text).all():
        raise ExportError("state: its text features are not finite; take an earlier round's state")
    return text


def _load(bundle: Path, manifest: BundleManifest, name: str) -> onnx.ModelProto:
    path = bundle / manifest.graphs[name].file
    check_external_data(path, manifest.files)
    return onnx.load(path)


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


def _fold_constants(model: onnx.ModelProto) -> None:
    """Compute once what depends on no photo: transposed weights, whatever the head makes of text and state."""
    known = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    opsets = {opset.domain: opset.version for opset in model.opset_import}
    kept = []
    for node in model.graph.node:
        if all(name in known for name in node.input if name):
            outputs = ReferenceEvaluator(node, opsets=opsets).run(
                None, {name: known[name] for name in node.input}
            )
            for name, value in zip(node.output, outputs, strict=True):
                known[name] = value
                model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
        else:
            kept.append(node)
    replace(model.graph.node, kept)


def replace(field: Any, values: Sequence[Any]) -> None:
    """Give a repeated protobuf field these values instead."""
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
    replace(graph.node, kept[::-1])
    replace(graph.initializer, [tensor for tensor in graph.initializer if tensor.name in needed])
    del graph.value_info[:]
