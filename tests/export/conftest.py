"""Shared by the tests of exported graphs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

# Supported in the ONNX parser of TensorRT 10.15 (opsets 9 to 24): "Operator Support Matrix" in docs/operators.md of
# github.com/onnx/onnx-tensorrt, less those that it supports for some inputs only and that no graph here needs.
TENSORRT_OPERATORS = """
    Abs Add And ArgMax ArgMin AveragePool Cast Ceil Clip Concat Constant ConstantOfShape Conv Cos CumSum
    DequantizeLinear Div Einsum Elu Equal Erf Exp Expand Flatten Floor Gather GatherElements Gelu Gemm Greater
    GreaterOrEqual HardSigmoid Identity InstanceNormalization LayerNormalization LeakyRelu Less LessOrEqual Log
    LogSoftmax MatMul Max MaxPool Mean Min Mul Neg Not OneHot Or Pad Pow QuantizeLinear Range Reciprocal ReduceL1
    ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu
    Reshape Round Shape Sigmoid Sign Sin Slice Softmax Softplus Split Sqrt Squeeze Sub Sum Tanh Tile TopK
    Transpose Unsqueeze Where Xor
"""
TENSORRT_OPSETS = range(9, 25)


@pytest.fixture(scope="session")
def check_operators() -> Callable[[Path], None]:
    """Fails if a graph has an operator, opset or function that TensorRT's parser does not list."""

    def check(path: Path) -> None:
        model = onnx.load(path, load_external_data=False)
        assert {node.op_type for node in model.graph.node} <= set(TENSORRT_OPERATORS.split()), path.name
        assert [(opset.domain, opset.version in TENSORRT_OPSETS) for opset in model.opset_import] == [
            ("", True)
        ]
        assert len(model.functions) == 0

    return check
