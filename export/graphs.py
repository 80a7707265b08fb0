"""Turn a PyTorch function, gradients included, into an ONNX graph whose frozen weights stay outside it.

The function is traced with every weight as a named input; after the export those inputs become initializers
that point into one safetensors file (or lie in the graph). So nothing folds, copies or renames a weight, and
graphs share them. Node metadata (stack traces with paths) is stripped: the same versions give the same bytes.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import onnx
import onnx_ir.passes.common as passes
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper
from onnxscript.optimizer import fold_constants
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from fedmpt.protocol.manifest import TensorSpec

OPSET = 18
BATCH = "batch"

Tensors = Mapping[str, Tensor]
Function = Callable[[Tensors, Tensors], Tensors]


def trace_step(function: Function, weights: Tensors, inputs: Tensors) -> ModelProto:
    """Trace a function that takes gradients inside itself; shapes, the batch included, are the examples'.

    ``make_fx`` runs the function once, backward pass and all, and records every operation.
    """
    flat, examples, names, results = _flatten(function, weights, inputs)
    with _quiet():
        module = make_fx(flat)(*examples)
    return _export(module, examples, names, results, None)


def trace_forward(
    function: Function, weights: Tensors, inputs: Tensors, batched: Sequence[str]
) -> ModelProto:
    """Trace a function without gradients; the first dimension of the ``batched`` inputs is dynamic."""
    flat, examples, names, results = _flatten(function, weights, inputs)
    flat(*examples)  # names the results
    batch = torch.export.Dim(BATCH, min=1)
    shapes = tuple({0: batch} if name in batched else None for name in names)
    return _export(_Module(flat), examples, names, results, (shapes,) if batched else None)


class _Module(torch.nn.Module):
    """The exporter takes modules only."""

    def __init__(self, function: Callable[..., tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *arguments: Tensor) -> tuple[Tensor, ...]:
        return self.function(*arguments)


def _flatten(
    function: Function, weights: Tensors, inputs: Tensors
) -> tuple[Callable[..., tuple[Tensor, ...]], tuple[Tensor, ...], list[str], list[str]]:
    names = [*weights, *inputs]
    results: list[str] = []

    def flat(*arguments: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(names, arguments, strict=True))
        outputs = function({name: given[name] for name in weights}, {name: given[name] for name in inputs})
        results[:] = outputs
        return tuple(outputs.values())

    return flat, (*weights.values(), *inputs.values()), names, results


def _export(
    module: torch.nn.Module,
    examples: tuple[Tensor, ...],
    names: list[str],
    results: list[str],
    shapes: tuple[object, ...] | None,
) -> ModelProto:
    with _quiet():
        program = torch.onnx.export(
            module.eval(),
            examples,
            dynamo=True,
            input_names=names,
            output_names=results,
            dynamic_shapes=shapes,
            opset_version=OPSET,
            external_data=False,
            optimize=False,  # its pattern rewriter takes longer than the export and gains nothing here
            verbose=False,
        )
        assert program is not None
        fold_constants(program.model)
        passes.CommonSubexpressionEliminationPass()(program.model)
        passes.RemoveUnusedNodesPass()(program.model)
    return _strip(_multiply_transposed(program.model_proto))


def _multiply_transposed(model: ModelProto) -> ModelProto:
    """Let products with a transposed matrix input (a gradient's) read it as it lies.

    A runtime would keep a transposed copy of every weight instead, in memory that no file backs.
    """
    graph = model.graph
    matrices = {value.name for value in graph.input if len(value.type.tensor_type.shape.dim) == 2}
    planes = {value.name for value in graph.value_info if len(value.type.tensor_type.shape.dim) == 2}
    transposed = {
        node.output[0]: node.input[0]
        for node in graph.node
        if node.op_type == "Transpose" and node.input[0] in matrices
    }
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in transposed and node.input[0] in planes:
            node.op_type = "Gemm"
            node.input[1] = transposed[node.input[1]]
            node.attribute.append(helper.make_attribute("transB", 1))
    used = {name for node in graph.node for name in node.input} | {output.name for output in graph.output}
    kept = [node for node in graph.node if used & set(node.output)]
    del graph.node[:]
    graph.node.extend(kept)
    return model


def _strip(model: ModelProto) -> ModelProto:
    """Remove what differs from machine to machine: stack traces, documentation, the producer's notes."""
    graph = model.graph
    for item in (
        model,
        graph,
        *graph.node,
        *graph.input,
        *graph.output,
        *graph.value_info,
        *graph.initializer,
    ):
        item.ClearField("metadata_props")
        item.ClearField("doc_string")
    del graph.value_info[:]
    return model


def place_weights(model: ModelProto, weights: Tensors, store: Path | None) -> ModelProto:
    """Turn the inputs that are weights into initializers, and drop those that nothing uses.

    Args:
        weights: as stored; a float16 weight gets a cast to float32 before its first use.
        store: the safetensors file that holds them, beside which the graph will lie; None puts them inside.
    """
    graph = model.graph
    used = {name for node in graph.node for name in node.input} | {output.name for output in graph.output}
    kept = [item for item in graph.input if item.name not in weights]
    del graph.input[:]
    graph.input.extend(kept)
    places = _places(store) if store else {}
    casts = []
    for name in sorted(set(weights) & used):
        tensor = weights[name]
        half = tensor.dtype == torch.float16
        stored_name = f"{name}.float16" if half else name
        if store:
            initializer = TensorProto(name=stored_name, dims=tensor.shape)
            initializer.data_type = TensorProto.FLOAT16 if half else TensorProto.FLOAT
            initializer.data_location = TensorProto.EXTERNAL
            offset, length = places[name]
            for key, value in (("location", store.name), ("offset", offset), ("length", length)):
                initializer.external_data.add(key=key, value=str(value))
        else:
            initializer = numpy_helper.from_array(tensor.contiguous().numpy(), stored_name)
        graph.initializer.append(initializer)
        if half:
            casts.append(
                helper.make_node("Cast", [stored_name], [name], f"cast.{name}", to=TensorProto.FLOAT)
            )
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    return model


def _places(store: Path) -> dict[str, tuple[int, int]]:
    """Offset and length in bytes of every tensor of a safetensors file."""
    with store.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    return {
        name: (8 + size + entry["data_offsets"][0], entry["data_offsets"][1] - entry["data_offsets"][0])
        for name, entry in header.items()
        if name != "__metadata__"
    }


def describe(values: Sequence[onnx.ValueInfoProto]) -> dict[str, TensorSpec]:
    """dtype and shape of a graph's inputs or outputs by name; a dynamic dimension has its name."""
    specs = {}
    for value in values:
        kind = value.type.tensor_type
        dtype = helper.tensor_dtype_to_np_dtype(kind.elem_type).name
        shape = tuple(size.dim_param or size.dim_value for size in kind.shape.dim)
        specs[value.name] = TensorSpec(dtype, shape)
    return specs


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's warnings and PyTorch's trace log, thousands of records, from the program's handlers."""
    exporter, trace = logging.getLogger("torch.onnx"), logging.getLogger("torch.__trace")
    level, disabled = exporter.level, trace.disabled
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns of its own internals
        try:
            exporter.setLevel(logging.ERROR)
            trace.disabled = True
            yield
        finally:
            exporter.setLevel(level)
            trace.disabled = disabled
