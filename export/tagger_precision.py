"""A tagger in float16, or in int8 by ONNX Runtime's quantisation; what is sensitive stays in float32.

Reduced are the encoder's layers, from the patch embedding to the last block. In float32 stay the normalisation of
the pixels, the projection into the joint space, the normalisation of the tokens, and the head: transport multiplies
differences of cosines by hundreds.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from fedmpt.export.tagger_graph import replace
from fedmpt.protocol.errors import FedmptError

PRECISIONS = ("float32", "float16", "int8")


class PrecisionError(FedmptError):
    """The precision is unknown, or ONNX Runtime, which converts to it, is not installed."""


def reduce_precision(
    model: onnx.ModelProto, precision: str, batches: Iterable[NDArray[np.uint8]] = ()
) -> onnx.ModelProto:
    """The tagger's graph in another precision; inputs and outputs keep their types.

    Args:
        model: a float32 tagger, constants folded.
        precision: ``float16``, or ``int8``: static, symmetric, weights by channel, as TensorRT takes it.
        batches: for ``int8``, photos uint8 ``[B, S, S, 3]`` on which the ranges of activations are found.

    Raises:
        PrecisionError: the precision is unknown, or ONNX Runtime is not installed, which int8 needs.
    """
    if precision == "float16":
        return _to_float16(model)
    if precision != "int8":
        raise PrecisionError(f"precision {precision!r} is unknown; use one of {', '.join(PRECISIONS)}")
    try:
        return _to_int8(model, batches)
    except ModuleNotFoundError as error:
        raise PrecisionError(
            f"--precision int8: {error.name} is not installed; pip install 'fedmpt-edge[cpu]'"
        ) from error


def _to_float16(model: onnx.ModelProto) -> onnx.ModelProto:
    """Convert the encoder's layers, casting where a tensor enters or leaves them.

    ONNX Runtime's converter is of no use here: it rounds every tensor between two nodes that are to stay in float32.
    """
    graph = onnx.shape_inference.infer_shapes(model).graph
    floats = {
        value.name for value in graph.value_info if value.type.tensor_type.elem_type == TensorProto.FLOAT
    }
    layers = set(_layers(model))
    produced = {name: node.name in layers for node in graph.node for name in node.output}
    weights = {tensor.name: tensor for tensor in graph.initializer if tensor.data_type == TensorProto.FLOAT}
    nodes, casts = [], set()

    def cast(name: str, half: bool) -> str:
        target = f"{name}.{'half' if half else 'float'}"
        if target not in casts:
            casts.add(target)
            to = TensorProto.FLOAT16 if half else TensorProto.FLOAT
            nodes.append(helper.make_node("Cast", [name], [target], target, to=to))
        return target

    for node in model.graph.node:
        half = node.name in layers
        for index, name in enumerate(node.input):
            if name in weights and half:
                node.input[index] = f"{name}.half"
            elif name in floats and produced[name] != half:
                node.input[index] = cast(name, half)
        nodes.append(node)
    used = {name for node in nodes for name in node.input}
    for name, tensor in weights.items():
        if f"{name}.half" in used:
            halved = numpy_helper.to_array(tensor).astype(np.float16)
            model.graph.initializer.append(numpy_helper.from_array(halved, f"{name}.half"))
    replace(model.graph.node, nodes)
    replace(model.graph.initializer, [tensor for tensor in model.graph.initializer if tensor.name in used])
    return model


def _to_int8(model: onnx.ModelProto, batches: Iterable[NDArray[np.uint8]]) -> onnx.ModelProto:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.quant_utils import add_pre_process_metadata

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # its way to be given data
        def __init__(self, batches: Iterator[NDArray[np.uint8]]) -> None:
            self._batches = batches

        def get_next(self) -> dict[str, NDArray[np.uint8]] | None:
            return next(({"pixels": batch} for batch in self._batches), None)

    # Its preprocessing, which it warns is missing, folds constants and infers shapes: done.
    add_pre_process_metadata(model)
    with tempfile.TemporaryDirectory() as folder:
        quantize_static(
            model,
            Path(folder) / "int8.onnx",
            Reader(iter(batches)),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["MatMul"],
            nodes_to_quantize=_layers(model),
            per_channel=True,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            extra_options={"ActivationSymmetric": True, "WeightSymmetric": True, "MatMulConstBOnly": True},
        )
        return onnx.load(Path(folder) / "int8.onnx")


def _layers(model: onnx.ModelProto) -> list[str]:
    """Names of the nodes that are reduced: from the patch embedding to before the projection."""
    nodes = [node for node in model.graph.node if node.name.startswith("encoder/")]
    constants = {tensor.name for tensor in model.graph.initializer}
    linear = [
        index for index, node in enumerate(nodes) if node.op_type == "MatMul" and node.input[1] in constants
    ]
    first = next(index for index, node in enumerate(nodes) if node.op_type == "Conv")
    return [node.name for node in nodes[first : linear[-1]]]
