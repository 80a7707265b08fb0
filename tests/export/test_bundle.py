"""A bundle is complete, described, verified and repeatable; bad input leaves nothing behind."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file

from fedmpt.export import bundle as bundles
from fedmpt.export import programs
from fedmpt.export.bundle import PAPER_TRAINING, BuildError, build_bundle
from fedmpt.export.clip import ClipCheckpoint, load_clip
from fedmpt.export.frozen import PromptError, load_frozen
from fedmpt.export.verification import VerificationError, verify_graphs
from fedmpt.protocol.codec import load_state
from fedmpt.protocol.manifest import Pooling, load_manifest, verify_bundle

Arrays = dict[str, NDArray[Any]]
GRAPHS = ("image_encoder", "train_step", "text_features", "head")


def run(folder: Path, name: str, inputs: Arrays) -> Arrays:
    session = onnxruntime.InferenceSession(folder / f"{name}.onnx", providers=["CPUExecutionProvider"])
    names = [item.name for item in session.get_outputs()]
    given = {item.name: inputs[item.name] for item in session.get_inputs()}
    return dict(zip(names, session.run(names, given), strict=True))


def batch(folder: Path, photos: int) -> Arrays:
    """The initial state and random photos."""
    manifest = load_manifest(folder)
    setup, _ = load_frozen(folder)
    example = programs.example_batch(setup, manifest.tokens.count, photos)
    state = load_state(folder / "state.safetensors", manifest.state)
    return {**state, **{name: value.numpy() for name, value in example.items()}}


def test_a_bundle_holds_the_four_graphs_and_matches_its_manifest(tiny_bundle: Path) -> None:
    manifest = load_manifest(tiny_bundle)
    verify_bundle(tiny_bundle, manifest)
    assert set(manifest.graphs) == set(GRAPHS)
    graphs = [f"{name}.onnx" for name in GRAPHS]
    assert set(manifest.files) == {*graphs, "state.safetensors", "text_weights.safetensors"}
    assert {path.name for path in tiny_bundle.iterdir()} == {*manifest.files, "manifest.json"}
    assert manifest.tokens == dataclasses.replace(
        manifest.tokens, mode="full", count=10, grid=(3, 3), width=24
    )


@pytest.mark.parametrize("name", GRAPHS)
def test_the_manifest_describes_what_onnx_runtime_sees(tiny_bundle: Path, name: str) -> None:
    graph = load_manifest(tiny_bundle).graphs[name]
    session = onnxruntime.InferenceSession(tiny_bundle / graph.file, providers=["CPUExecutionProvider"])
    kinds = {"float32": "tensor(float)", "int8": "tensor(int8)", "uint8": "tensor(uint8)"}
    for seen, described in ((session.get_inputs(), graph.inputs), (session.get_outputs(), graph.outputs)):
        assert [item.name for item in seen] == list(described)
        for item in seen:
            assert kinds[described[item.name].dtype] == item.type
            assert list(described[item.name].shape) == item.shape


@pytest.mark.parametrize("name", GRAPHS)
def test_graphs_hold_only_operators_that_tensorrt_lists(
    tiny_bundle: Path, name: str, check_operators: Callable[[Path], None]
) -> None:
    check_operators(tiny_bundle / f"{name}.onnx")


@pytest.mark.parametrize("name", GRAPHS)
def test_graphs_hold_no_trace_of_the_machine(tiny_bundle: Path, name: str) -> None:
    model = onnx.load(tiny_bundle / f"{name}.onnx", load_external_data=False)
    graph = model.graph
    assert not any(item.metadata_props or item.doc_string for item in (model, graph, *graph.node))
    content = (tiny_bundle / f"{name}.onnx").read_bytes()
    assert b"site-packages" not in content
    assert str(Path(__file__).parents[2]).encode() not in content


def test_the_text_weights_are_stored_once_and_graphs_point_into_them(tiny_bundle: Path) -> None:
    stored = load_file(tiny_bundle / "text_weights.safetensors")
    content = (tiny_bundle / "text_weights.safetensors").read_bytes()
    found = set()
    for name in ("train_step", "text_features"):
        for item in onnx.load(tiny_bundle / f"{name}.onnx", load_external_data=False).graph.initializer:
            place = {entry.key: entry.value for entry in item.external_data}
            if place:
                begin = int(place["offset"])
                data = content[begin : begin + int(place["length"])]
                assert place["location"] == "text_weights.safetensors"
                np.testing.assert_array_equal(
                    np.frombuffer(data, "<f4").reshape(tuple(item.dims)), stored[item.name]
                )
                found.add(item.name)
    assert found == set(stored)


def test_photos_without_known_labels_change_nothing(tiny_bundle: Path) -> None:
    full = batch(tiny_bundle, 8)
    full["labels"][5:] = -1
    first = run(tiny_bundle, "train_step", full)
    full["tokens"][5:] = np.roll(full["tokens"][5:], 3, axis=-1)
    second = run(tiny_bundle, "train_step", full)
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name])
    setup, weights = load_frozen(tiny_bundle)
    state = {name: torch.from_numpy(np.asarray(full[name])) for name in load_manifest(tiny_bundle).state}
    alone = programs.run_train_step(
        setup,
        PAPER_TRAINING,
        weights,
        state,
        torch.tensor(full["tokens"][:5]),
        torch.tensor(full["labels"][:5]),
    )
    for name, value in alone.items():
        np.testing.assert_allclose(first[name], value.numpy(), rtol=1e-4, atol=1e-6)


def test_a_batch_without_any_known_label_has_no_loss_and_no_gradient(tiny_bundle: Path) -> None:
    inputs = batch(tiny_bundle, 8)
    inputs["labels"][:] = -1
    assert all(not np.any(value) for value in run(tiny_bundle, "train_step", inputs).values())


@pytest.mark.parametrize("photos", [1, 5])
def test_encoder_and_head_take_any_number_of_photos(tiny_bundle: Path, photos: int) -> None:
    inputs = batch(tiny_bundle, photos)
    inputs["text"] = run(tiny_bundle, "text_features", inputs)["text"]
    output = run(tiny_bundle, "head", inputs)
    assert output["scores"].shape == (photos, 4)
    np.testing.assert_allclose(output["plan"].sum(2), 1, rtol=1e-5)
    np.testing.assert_allclose(
        output["logits"], inputs["scale"] * output["scores"] + inputs["bias"], rtol=1e-5
    )
    pixels = np.zeros((photos, 48, 48, 3), np.uint8)
    tokens = run(tiny_bundle, "image_encoder", {"pixels": pixels})["tokens"]
    np.testing.assert_allclose(np.linalg.norm(tokens, axis=2), np.ones((photos, 10)), rtol=1e-5)


def test_a_graph_that_computes_something_else_is_refused(tiny_bundle: Path, clip: ClipCheckpoint) -> None:
    setup, weights = load_frozen(tiny_bundle)
    manifest = load_manifest(tiny_bundle)
    arrays = load_state(tiny_bundle / "state.safetensors", manifest.state)
    state = {name: torch.from_numpy(np.array(value)) for name, value in arrays.items()}
    assert max(verify_graphs(tiny_bundle, manifest, clip, setup, weights, state).values()) <= 1e-5
    other = dataclasses.replace(setup, logit_scale=1.001 * setup.logit_scale)
    with pytest.raises(
        VerificationError, match=r"head\.onnx: \w+ differs from PyTorch by \S+ \(allowed 2e-05\)"
    ):
        verify_graphs(tiny_bundle, manifest, clip, other, weights, state)


@pytest.mark.slow
def test_the_same_inputs_give_the_same_digests(tiny_bundle: Path, tiny_clip: Path, tmp_path: Path) -> None:
    kept = load_manifest(tiny_bundle)
    again = build_bundle(
        load_clip(str(tiny_clip)),
        kept.labels,
        tmp_path / "again",
        conditions=kept.conditions,
        training=kept.training,
    )
    assert dict(again.files) == dict(kept.files)
    assert dataclasses.replace(again, clip=kept.clip).digest == kept.digest


@pytest.mark.slow
def test_float16_weights_take_half_the_room_and_barely_move_the_gradient(
    tiny_bundle: Path, tiny_clip: Path, tmp_path: Path
) -> None:
    kept = load_manifest(tiny_bundle)
    folder = tmp_path / "half"
    half = build_bundle(
        load_clip(str(tiny_clip)),
        kept.labels,
        folder,
        conditions=kept.conditions,
        training=kept.training,
        precision="float16",
    )
    assert half.precision == "float16"
    for name in ("text_weights.safetensors", "image_encoder.onnx"):
        assert (folder / name).stat().st_size < 0.65 * (tiny_bundle / name).stat().st_size
    inputs = batch(tiny_bundle, 8)
    exact, rounded = (run(place, "train_step", inputs) for place in (tiny_bundle, folder))
    for name, value in exact.items():
        assert np.abs(rounded[name] - value).max() <= 1e-2 * np.abs(value).max(), name


@pytest.fixture(scope="module")
def clip(tiny_clip: Path) -> ClipCheckpoint:
    return load_clip(str(tiny_clip))


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"labels": ["cat", "dog", "Cat"]}, BuildError, "label 'Cat' is given twice \\(as 'cat'\\)"),
        ({"labels": []}, BuildError, "no labels are given"),
        ({"labels": ["cat "]}, BuildError, "label 'cat ' is empty or starts or ends with a space"),
        ({"labels": ["cat", "x" * 80]}, PromptError, "label 'xxx.*the text tower takes 77; shorten"),
        ({"labels": ["cat <|endoftext|>"]}, PromptError, "does not know these characters"),
        ({"conditions": ["weather", "weather"]}, BuildError, "condition 'weather' is given twice"),
        ({"method": "magic"}, BuildError, "method 'magic' is unknown; choose one of fedmpt-prompts"),
        ({"token_kind": "magic"}, BuildError, "choose one of plain, maskclip, clearclip"),
        ({"token_mode": "magic"}, BuildError, "choose one of full, pooled"),
        ({"precision": "int4"}, BuildError, "choose one of float32, float16"),
        ({"pooling": Pooling("mean", 1, 1, 1)}, BuildError, "choose one of transport, softmax, max"),
        ({"pooling": Pooling("transport", 1, 0, 1)}, BuildError, "reg is 0; it must be above 0"),
        ({"class_context": 0}, BuildError, "class context is 0; it must be above 0"),
    ],
)
def test_unusable_input_is_named_and_leaves_nothing(
    clip: ClipCheckpoint, tmp_path: Path, options: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        build_bundle(clip, options.pop("labels", ["cat"]), tmp_path / "bundle", **options)
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_never_overwritten(clip: ClipCheckpoint, tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "mine").write_text("keep")
    with pytest.raises(BuildError, match="bundle: exists already; remove it or give another folder"):
        build_bundle(clip, ["cat"], tmp_path / "bundle")
    assert (tmp_path / "bundle" / "mine").read_text() == "keep"


def test_a_build_that_fails_leaves_nothing(
    clip: ClipCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        assert list(tmp_path.iterdir()), "the build writes beside its target"
        raise RuntimeError("the exporter broke")

    monkeypatch.setattr(bundles.programs, "trace_image_encoder", fail)
    with pytest.raises(RuntimeError, match="the exporter broke"):
        build_bundle(clip, ["cat"], tmp_path / "bundle")
    assert not list(tmp_path.iterdir())
