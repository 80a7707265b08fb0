"""The torch engine on a real bundle of a tiny CLIP: on a CPU against the ONNX engine, on a GPU against the CPU."""

import numpy as np
import pytest
import torch

from fedmpt.edge_client.engine import EngineError, open_engine
from fedmpt.edge_client.torch_engine import TorchEngine
from fedmpt.protocol.manifest import BundleError

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@pytest.fixture(scope="module")
def engine(tiny_bundle):
    return open_engine(tiny_bundle, "torch", "cpu", threads=1)


def _assert_close(found, expected, tolerance):
    """Each array within a share of its own largest value."""
    assert sorted(found) == sorted(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(
            found[name], value, rtol=0, atol=tolerance * np.abs(value).max(), err_msg=name
        )


@pytest.mark.parametrize("count", [8, 5])
def test_both_engines_give_one_loss_and_one_gradient(engine, tiny_bundle, state, count, draw_batch):
    onnx = open_engine(tiny_bundle, "onnx", "cpu", threads=1)
    loss, gradients = engine.train_step(state, *draw_batch(count))
    onnx_loss, onnx_gradients = onnx.train_step(state, *draw_batch(count))
    assert loss == pytest.approx(onnx_loss, rel=1e-5)
    _assert_close(gradients, onnx_gradients, 1e-4)


def test_both_engines_give_one_text_and_one_prediction(engine, tiny_bundle, state, draw_batch):
    onnx = open_engine(tiny_bundle, "onnx", "cpu", threads=1)
    text, tokens = onnx.text_features(state), draw_batch(3)[0]
    np.testing.assert_allclose(engine.text_features(state), text, atol=1e-5)
    found, expected = engine.head(state, text, tokens), onnx.head(state, text, tokens)
    _assert_close(vars(found), vars(expected), 1e-4)


def test_equal_inputs_give_equal_bits(engine, state, draw_batch):
    first, second = (engine.train_step(state, *draw_batch(8)) for _ in range(2))
    assert first[0] == second[0]
    assert all(np.array_equal(first[1][name], second[1][name]) for name in state)


def test_a_bfloat16_tower_keeps_state_and_gradients_in_float32(
    engine, tiny_bundle, manifest, state, draw_batch
):
    half = TorchEngine(tiny_bundle, manifest, torch.device("cpu"), half=True)
    text, exact = half.text_features(state), engine.text_features(state)
    assert text.dtype == np.float32
    assert not np.array_equal(text, exact)
    np.testing.assert_allclose(text, exact, atol=2e-2)
    loss, gradients = half.train_step(state, *draw_batch(8))
    exact_loss, exact_gradients = engine.train_step(state, *draw_batch(8))
    assert loss == pytest.approx(exact_loss, rel=2e-2)
    for name, value in exact_gradients.items():
        assert gradients[name].dtype == np.float32
        cosine = (gradients[name] * value).sum() / np.linalg.norm(gradients[name]) / np.linalg.norm(value)
        assert cosine > 0.98, name


def test_staging_a_batch_changes_nothing(engine, state, draw_batch):
    batch = draw_batch(8)
    expected = engine.train_step(state, *batch)
    engine.stage(*batch)
    assert engine.train_step(state, *batch)[0] == expected[0]


def test_a_state_of_another_bundle_is_refused_with_the_missing_names(engine, state, draw_batch):
    without = {name: value for name, value in state.items() if name != "class_context"}
    with pytest.raises(EngineError, match="needs class_context; the state is not of this bundle"):
        engine.train_step(without, *draw_batch(2))
    with pytest.raises(EngineError, match="needs class_context"):
        engine.text_features(without)


def test_devices_that_are_not_there_are_refused(tiny_bundle):
    with pytest.raises(EngineError, match="engine torch has no device 'tensorrt'; use cpu or cuda"):
        open_engine(tiny_bundle, "torch", "tensorrt")
    if not torch.cuda.is_available():
        with pytest.raises(EngineError, match="sees no NVIDIA GPU; use --device cpu"):
            open_engine(tiny_bundle, "torch", "cuda")


def test_a_folder_without_a_bundle_is_refused(tmp_path):
    with pytest.raises(BundleError, match=r"manifest\.json: not found"):
        open_engine(tmp_path, "torch", "cpu")


@needs_gpu
@pytest.mark.parametrize("count", [8, 5])
def test_the_captured_step_equals_the_eager_one(engine, tiny_bundle, state, count, draw_batch):
    cuda = open_engine(tiny_bundle, "torch", "cuda")
    for seed in range(3):  # replays must follow their inputs
        batch = draw_batch(count, seed)
        loss, gradients = cuda.train_step(state, *batch)
        exact_loss, exact = engine.train_step(state, *batch)
        assert loss == pytest.approx(exact_loss, rel=2e-2)
        _assert_close(gradients, exact, 0.1)


@needs_gpu
def test_staged_batches_are_used_in_their_order(tiny_bundle, state, draw_batch):
    cuda = open_engine(tiny_bundle, "torch", "cuda")
    batches = [draw_batch(8, seed) for seed in range(4)]
    expected = [cuda.train_step(state, *batch)[0] for batch in batches]
    cuda.stage(*batches[2])  # left over from a round that ended early
    cuda.stage(*batches[0])
    found = []
    for number, batch in enumerate(batches):
        if number + 1 < len(batches):
            cuda.stage(*batches[number + 1])
        found.append(cuda.train_step(state, *batch)[0])
    assert found == expected
    with pytest.raises(EngineError, match="a batch of 9 photos, but the bundle's train step takes 8"):
        cuda.train_step(state, *draw_batch(9))
