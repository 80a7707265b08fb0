"""One self-contained file that computes what the bundle's graphs and PyTorch compute."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from fedmpt.edge_client.tagger import Tagger
from fedmpt.export import tagger as exporter
from fedmpt.export.tagger import Calibration, export_tagger
from fedmpt.export.tagger_graph import ExportError, text_features
from fedmpt.protocol.codec import State, load_state, state_digest
from fedmpt.protocol.manifest import BundleError, BundleManifest, load_manifest
from fedmpt.protocol.tagger_info import Measurement


@pytest.fixture(scope="module")
def manifest(tiny_bundle: Path) -> BundleManifest:
    return load_manifest(tiny_bundle)


@pytest.fixture(scope="module")
def state(tiny_bundle: Path, manifest: BundleManifest) -> State:
    """Not the initial state: every tensor has its own values."""
    random = np.random.default_rng(1)
    initial = load_state(tiny_bundle / "state.safetensors", manifest.state)
    tuned = {
        name: (value + random.normal(0, 0.05, value.shape)).astype(np.float32)
        for name, value in initial.items()
    }
    return tuned | {"scale": np.array(20, np.float32), "bias": np.array(-1, np.float32)}


@pytest.fixture(scope="module")
def exported(tiny_bundle: Path, state: State, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tagger") / "tagger.onnx"
    export_tagger(tiny_bundle, state, out, provenance={"federation": "farm", "rounds": "7"})
    return out


def pixels(count: int, size: int) -> np.ndarray:
    return np.random.default_rng(2).integers(0, 256, (count, size, size, 3), np.uint8)


def run(path: Path, outputs: list[str], inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(outputs, inputs)  # type: ignore[no-any-return]


def run_bundle(bundle: Path, state: State, photos: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, logits and plan by the bundle's own graphs."""
    graphs = load_manifest(bundle).graphs
    (text,) = run(
        bundle / "text_features.onnx",
        ["text"],
        {name: state[name] for name in graphs["text_features"].inputs},
    )
    (tokens,) = run(bundle / "image_encoder.onnx", ["tokens"], {"pixels": photos})
    values = {**state, "text": text, "tokens": tokens}
    logits, plan = run(
        bundle / "head.onnx", ["logits", "plan"], {name: values[name] for name in graphs["head"].inputs}
    )
    return tokens, logits, plan


@pytest.mark.parametrize("count", [1, 5])
def test_it_computes_what_the_bundles_graphs_compute(
    tiny_bundle: Path, exported: Path, state: State, count: int
) -> None:
    photos = pixels(count, 48)
    _, logits, plan = run_bundle(tiny_bundle, state, photos)
    probabilities, heatmaps = run(exported, ["probabilities", "heatmaps"], {"pixels": photos})
    assert probabilities.shape == (count, 4)
    np.testing.assert_allclose(probabilities, 1 / (1 + np.exp(-logits)), atol=1e-4)
    assert probabilities.std() > 0.01
    np.testing.assert_allclose(heatmaps, plan.reshape(count, 4, 3, 3), atol=1e-4)
    np.testing.assert_allclose(heatmaps.sum((2, 3)), 1, atol=1e-4)


def test_it_computes_what_pytorch_computes_from_the_same_tokens(
    tiny_bundle: Path, exported: Path, state: State
) -> None:
    import torch

    from fedmpt.export import methods
    from fedmpt.export.frozen import load_frozen
    from fedmpt.export.programs import run_head

    photos = pixels(3, 48)
    tokens, _, _ = run_bundle(tiny_bundle, state, photos)
    setup, weights = load_frozen(tiny_bundle)
    tensors = {name: torch.from_numpy(np.array(value)) for name, value in state.items()}
    with torch.no_grad():
        text = methods.text_features(setup, weights, tensors)
        expected = torch.sigmoid(run_head(setup, tensors, torch.from_numpy(tokens), text)["logits"])
    (probabilities,) = run(exported, ["probabilities"], {"pixels": photos})
    np.testing.assert_allclose(probabilities, expected, atol=1e-4)


def test_temperature_divides_the_logits(tiny_bundle: Path, state: State, tmp_path: Path) -> None:
    calibration = Calibration([0.1, 0.2, 0.3, 0.4], temperature=2.5)
    info = export_tagger(tiny_bundle, state, tmp_path / "t.onnx", calibration=calibration)
    photos = pixels(2, 48)
    _, logits, _ = run_bundle(tiny_bundle, state, photos)
    (probabilities,) = run(tmp_path / "t.onnx", ["probabilities"], {"pixels": photos})
    np.testing.assert_allclose(probabilities, 1 / (1 + np.exp(-logits / 2.5)), atol=1e-4)
    assert (info.temperature, info.thresholds) == (2.5, (0.1, 0.2, 0.3, 0.4))


def test_it_has_only_operators_that_tensorrt_lists(
    exported: Path, check_operators: Callable[[Path], None]
) -> None:
    check_operators(exported)


def test_uint8_is_cast_at_once_because_tensorrt_takes_it_at_the_border_only(exported: Path) -> None:
    model = onnx.shape_inference.infer_shapes(onnx.load(exported))
    assert [node.op_type for node in model.graph.node if "pixels" in node.input] == ["Cast"]
    inside = [
        value.name
        for value in model.graph.value_info
        if value.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    ]
    assert inside == []


def test_nothing_that_depends_on_no_photo_is_left_to_compute(exported: Path) -> None:
    graph = onnx.load(exported).graph
    depends = {"pixels"}
    for node in graph.node:
        assert depends & set(node.input), node.name
        depends.update(node.output)
    used = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    assert {tensor.name for tensor in graph.initializer} <= used


def test_the_file_needs_no_other(exported: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone.onnx"
    shutil.copy(exported, alone)
    onnx.checker.check_model(alone, full_check=True)
    assert Tagger.load(alone, "cpu").tag(pixels(1, 48)[0], min_probability=0.0)
    assert all(
        not tensor.external_data for tensor in onnx.load(alone, load_external_data=False).graph.initializer
    )


def test_heat_maps_can_be_left_out(tiny_bundle: Path, state: State, tmp_path: Path, exported: Path) -> None:
    export_tagger(tiny_bundle, state, tmp_path / "t.onnx", heatmaps=False)
    tagger = Tagger.load(tmp_path / "t.onnx", "cpu")
    photos = pixels(2, 48)
    assert not tagger.has_heatmaps
    assert tagger.predict(photos).heatmaps is None
    with_maps = Tagger.load(exported, "cpu").predict(photos)
    np.testing.assert_array_equal(tagger.predict(photos).probabilities, with_maps.probabilities)


def test_the_metadata_tells_where_it_came_from(
    tiny_bundle: Path, manifest: BundleManifest, exported: Path, state: State
) -> None:
    info = Tagger.load(exported, "cpu").info
    assert info.labels == manifest.labels
    assert (info.image_size, info.grid, info.method) == (48, (3, 3), manifest.method)
    assert (info.clip, info.licence) == (manifest.clip.name, manifest.clip.licence)
    assert (info.state_digest, info.bundle_digest) == (state_digest(state), manifest.digest)
    assert info.provenance == {"federation": "farm", "rounds": "7"}


def test_the_model_card_says_it_to_people(
    tiny_bundle: Path, manifest: BundleManifest, state: State, tmp_path: Path
) -> None:
    measurement = Measurement(120, "north (--validation)", 0.812, 0.0934, 0.0251, rule="those of best F1")
    calibration = Calibration([0.25, 0.5, 0.75, 1.0], 1.5)
    export_tagger(
        tiny_bundle,
        state,
        tmp_path / "t.onnx",
        calibration=calibration,
        measurement=measurement,
        provenance={"federation": "farm", "method": manifest.method, "bundle": manifest.digest},
    )
    card = (tmp_path / "model-card.md").read_text()
    for line in (
        "- federation: farm",
        f"- State: sha256 {state_digest(state)}",
        "- Licence of the CLIP weights: unknown",
        "- Thresholds: those of best F1",
        "- Mean average precision: 81.2 %",
        "- Expected calibration error: 0.0934 before, 0.0251 after temperature 1.500",
        "| traffic light | 0.750 |",
    ):
        assert line in card.splitlines()
    assert "chosen on 120 photos of north (--validation), and the figures are of the same photos" in card
    assert card.count(manifest.method) == card.count(manifest.digest) == 1


def test_a_second_tagger_in_a_folder_leaves_the_first_ones_card(
    tiny_bundle: Path, state: State, tmp_path: Path
) -> None:
    for name in ("cats.onnx", "dogs.onnx", "cats.onnx"):
        export_tagger(tiny_bundle, state, tmp_path / name)
    titles = {path.name: path.read_text().splitlines()[0] for path in tmp_path.glob("*.md")}
    assert titles == {"model-card.md": "# cats.onnx", "dogs.model-card.md": "# dogs.onnx"}
    assert (tmp_path / "cats.onnx").read_bytes() == (tmp_path / "dogs.onnx").read_bytes()


def test_exporting_twice_gives_the_same_bytes(
    tiny_bundle: Path, state: State, exported: Path, tmp_path: Path
) -> None:
    export_tagger(tiny_bundle, state, tmp_path / "t.onnx", provenance={"federation": "farm", "rounds": "7"})
    assert (tmp_path / "t.onnx").read_bytes() == exported.read_bytes()


def test_without_onnx_runtime_the_text_features_are_the_same(
    tiny_bundle: Path, manifest: BundleManifest, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = text_features(tiny_bundle, manifest, state)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    np.testing.assert_allclose(text_features(tiny_bundle, manifest, state), expected, atol=1e-5)


def test_exporting_needs_no_torch(tiny_bundle: Path, tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from fedmpt.cli import main;"
        f"main(['export', '--bundle', {str(tiny_bundle)!r}, '--state', {str(tiny_bundle / 'state.safetensors')!r},"
        f" '--out', {str(tmp_path / 't.onnx')!r}]);"
        "print(*{'torch', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stdout.splitlines()[-1] == ""


def test_a_state_of_another_method_is_refused(tiny_bundle: Path, state: State, tmp_path: Path) -> None:
    other = {name: state[name] for name in ("scale", "bias")}
    with pytest.raises(
        ExportError, match=r"has bias, scale; method fedmpt-prompts of this bundle needs bias, class"
    ):
        export_tagger(tiny_bundle, other, tmp_path / "t.onnx")


def test_a_state_of_another_shape_is_refused(tiny_bundle: Path, state: State, tmp_path: Path) -> None:
    other = {**state, "class_context": state["class_context"][:1]}
    with pytest.raises(ExportError, match=r"class_context has shape \(1, 32\), this bundle needs \(4, 32\)"):
        export_tagger(tiny_bundle, other, tmp_path / "t.onnx")


def test_a_state_that_is_not_finite_is_refused(tiny_bundle: Path, state: State, tmp_path: Path) -> None:
    other = {**state, "bias": np.array(np.nan, np.float32)}
    with pytest.raises(ExportError, match="bias has values that are not finite"):
        export_tagger(tiny_bundle, other, tmp_path / "t.onnx")


@pytest.mark.parametrize(
    ("calibration", "complaint"),
    [
        (Calibration([0.5]), "1 thresholds; one between 0 and 1 is needed for each of the 4 labels"),
        (Calibration([0.5, 0.5, 0.5, 1.5]), "one between 0 and 1"),
        (Calibration([0.5, 0.5, 0.5, float("nan")]), "one between 0 and 1"),
        (Calibration([0.5] * 4, 0.0), "temperature 0.0 is not positive"),
    ],
)
def test_an_unusable_calibration_is_refused(
    tiny_bundle: Path, state: State, tmp_path: Path, calibration: Calibration, complaint: str
) -> None:
    with pytest.raises(ExportError, match=complaint):
        export_tagger(tiny_bundle, state, tmp_path / "t.onnx", calibration=calibration)


def test_more_than_one_file_can_hold_is_refused(
    tiny_bundle: Path, state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporter, "MAXIMUM_BYTES", 1000)
    with pytest.raises(ExportError, match="more than one ONNX file can hold"):
        export_tagger(tiny_bundle, state, tmp_path / "t.onnx")


def test_a_failure_leaves_the_older_file(tiny_bundle: Path, state: State, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, bundle)
    (bundle / "head.onnx").write_bytes((bundle / "head.onnx").read_bytes()[:-1])
    out = tmp_path / "t.onnx"
    out.write_text("older")
    with pytest.raises(BundleError, match=r"head\.onnx: differs from its digest"):
        export_tagger(bundle, state, out)
    assert out.read_text() == "older"
    assert {path.name for path in tmp_path.iterdir()} == {"bundle", "t.onnx"}


@pytest.mark.slow
@pytest.mark.parametrize("pooling", ["transport", "softmax", "max"])
@pytest.mark.parametrize("method", ["fedmpt-full", "zero-shot", "coop", "dualcoop", "positivecoop"])
def test_every_method_and_pooling_exports(
    tiny_clip: Path, tmp_path: Path, method: str, pooling: str, check_operators: Callable[[Path], None]
) -> None:
    from fedmpt.export.bundle import PAPER_POOLING, PAPER_TRAINING, build_bundle
    from fedmpt.export.clip import load_clip

    if pooling != "transport" and method != "fedmpt-full":
        pytest.skip("only FedMPT pools by choice")
    bundle = tmp_path / "bundle"
    build_bundle(
        load_clip(str(tiny_clip)),
        ["cat", "dog"],
        bundle,
        method=method,
        pooling=dataclasses.replace(PAPER_POOLING, name=pooling),
        training=dataclasses.replace(PAPER_TRAINING, batch_size=2),
    )
    state = load_state(bundle / "state.safetensors", load_manifest(bundle).state)
    export_tagger(bundle, state, tmp_path / "t.onnx")
    photos = pixels(2, 48)
    _, logits, plan = run_bundle(bundle, state, photos)
    found = Tagger.load(tmp_path / "t.onnx", "cpu").predict(photos)
    np.testing.assert_allclose(found.probabilities, 1 / (1 + np.exp(-logits)), atol=1e-4)
    np.testing.assert_allclose(found.heatmaps, plan.reshape(2, 2, 3, 3), atol=1e-4)
    if pooling == "max":
        assert (plan > 0).all()  # a map of the region, not of the best patch alone
    for graph in (tmp_path / "t.onnx", *bundle.glob("*.onnx")):
        check_operators(graph)
