"""Taggers in float16 and int8: smaller, close to float32, with the sensitive parts left alone."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from fedmpt.edge_client.tagger import Tagger
from fedmpt.export.tagger import Calibration, export_tagger
from fedmpt.export.tagger_graph import ExportError
from fedmpt.export.tagger_precision import PrecisionError
from fedmpt.protocol.codec import State, load_state
from fedmpt.protocol.manifest import load_manifest
from fedmpt.protocol.tagger_info import Measurement

PIXELS = np.random.default_rng(2).integers(0, 256, (8, 48, 48, 3), np.uint8)


@pytest.fixture(scope="module")
def state(tiny_bundle: Path) -> State:
    state = load_state(tiny_bundle / "state.safetensors", load_manifest(tiny_bundle).state)
    return {**state, "scale": np.array(5, np.float32)}


@pytest.fixture(scope="module")
def files(tiny_bundle: Path, state: State, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("precisions")
    found = {}
    for precision in ("float32", "float16", "int8"):
        found[precision] = folder / precision / "tagger.onnx"
        export_tagger(
            tiny_bundle, state, found[precision], precision=precision, photos=[PIXELS[:4], PIXELS[4:]]
        )
    return found


# The heat maps of int8 differ by 0.055 on processors without VNNI, whose products ONNX Runtime forms otherwise.
@pytest.mark.parametrize(
    ("precision", "tolerance", "of_maps"), [("float16", 0.005, 0.005), ("int8", 0.05, 0.06)]
)
def test_probabilities_and_heat_maps_stay_close(
    files: dict[str, Path], precision: str, tolerance: float, of_maps: float
) -> None:
    exact, reduced = (Tagger.load(files[name], "cpu").predict(PIXELS) for name in ("float32", precision))
    difference = np.abs(exact.probabilities - reduced.probabilities).max()
    assert 0 < difference < tolerance
    np.testing.assert_allclose(reduced.heatmaps, exact.heatmaps, atol=of_maps)


@pytest.mark.parametrize(("precision", "share"), [("float16", 0.6), ("int8", 0.45)])
def test_linear_layers_shrink(files: dict[str, Path], precision: str, share: float) -> None:
    def size(path: Path) -> int:
        tensors = onnx.load(path).graph.initializer
        return sum(
            numpy_helper.to_array(tensor).nbytes
            for tensor in tensors
            if tensor.name.startswith("encoder/") and len(tensor.dims) == 2
        )

    assert size(files[precision]) < share * size(files["float32"])


@pytest.mark.parametrize("precision", ["float16", "int8"])
def test_the_head_and_both_ends_stay_float32(files: dict[str, Path], precision: str) -> None:
    model = onnx.load(files[precision])
    outputs = [(value.name, value.type.tensor_type.elem_type) for value in model.graph.output]
    assert outputs == [("probabilities", TensorProto.FLOAT), ("heatmaps", TensorProto.FLOAT)]
    half = {
        tensor.name
        for tensor in model.graph.initializer
        if tensor.data_type in (TensorProto.FLOAT16, TensorProto.INT8)
    }
    assert half
    head = [node for node in model.graph.node if node.name.startswith("head/")]
    assert not half & {name for node in head for name in node.input}
    assert "QuantizeLinear" not in {node.op_type for node in head}


@pytest.mark.parametrize("precision", ["float16", "int8"])
def test_reduced_files_have_only_operators_that_tensorrt_lists(
    files: dict[str, Path], precision: str, check_operators: Callable[[Path], None]
) -> None:
    check_operators(files[precision])


def test_int8_is_quantised_as_tensorrt_takes_it(files: dict[str, Path]) -> None:
    model = onnx.load(files["int8"])
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    quantised = [node for node in model.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert len(quantised) >= 8
    for node in quantised:
        assert constants[node.input[2]].dtype == np.int8
        assert not constants[node.input[2]].any()  # "zero_point must be zero"
    assert [(opset.domain, opset.version) for opset in model.opset_import if opset.domain != ""] == []


def test_each_output_of_a_layer_has_a_range_of_its_own_in_int8(files: dict[str, Path]) -> None:
    model = onnx.load(files["int8"])
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    weights = [
        node for node in model.graph.node if node.op_type == "DequantizeLinear" and node.input[0] in constants
    ]
    assert weights
    for node in weights:
        assert constants[node.input[1]].shape == constants[node.input[0]].shape[-1:]
        assert len(np.unique(constants[node.input[1]])) > 1


def test_the_description_names_the_precision(files: dict[str, Path]) -> None:
    assert {name: Tagger.load(path, "cpu").info.precision for name, path in files.items()} == {
        "float32": "float32",
        "float16": "float16",
        "int8": "int8",
    }
    assert "arithmetic: int8." in (files["int8"].parent / "model-card.md").read_text()


def logits(path: Path) -> np.ndarray:
    said = Tagger.load(path, "cpu").predict(PIXELS).probabilities
    return np.log(said / (1 - said))


def test_what_was_measured_of_the_reduced_file_is_written(
    tiny_bundle: Path, state: State, tmp_path: Path
) -> None:
    measurement = Measurement(9, "north", map=0.5, cost=0.0012, reference="50.12 in float32 on 9 photos")

    def measure(exact: Path, reduced: Path) -> tuple[Calibration, Measurement]:
        taggers = [Tagger.load(path, "cpu") for path in (exact, reduced)]
        assert [tagger.info.precision for tagger in taggers] == ["float32", "float16"]
        assert [tagger.info.temperature for tagger in taggers] == [10, 10]
        return Calibration([0.1, 0.2, 0.3, 0.4], 2.0), measurement

    start = Calibration([0.5] * 4, 10.0)
    out = tmp_path / "t.onnx"
    export_tagger(tiny_bundle, state, out, precision="float16", calibration=start, measure=measure)
    written = Tagger.load(out, "cpu")
    assert (written.info.measurement, written.info.temperature) == (measurement, 2)
    assert written.info.thresholds == (0.1, 0.2, 0.3, 0.4)
    export_tagger(tiny_bundle, state, tmp_path / "plain.onnx", precision="float16")
    np.testing.assert_allclose(2 * logits(out), logits(tmp_path / "plain.onnx"), atol=1e-3)
    assert "0.12 points of mean average precision" in (tmp_path / "model-card.md").read_text()


def test_a_refused_precision_writes_nothing(tiny_bundle: Path, state: State, tmp_path: Path) -> None:
    def refuse(exact: Path, reduced: Path) -> tuple[Calibration, Measurement]:
        raise ExportError("too costly")

    with pytest.raises(ExportError, match="too costly"):
        export_tagger(tiny_bundle, state, tmp_path / "t.onnx", precision="float16", measure=refuse)
    assert list(tmp_path.iterdir()) == []


def test_without_onnx_runtime_it_says_what_to_install(
    tiny_bundle: Path, state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "onnxruntime"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(PrecisionError, match=r"--precision int8: .*pip install 'fedmpt-edge\[cpu\]'"):
        export_tagger(tiny_bundle, state, tmp_path / "t.onnx", precision="int8", photos=[PIXELS])
