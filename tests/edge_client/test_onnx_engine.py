"""The ONNX engine on a real bundle of a tiny CLIP."""

import dataclasses

import numpy as np
import pytest

from fedmpt.edge_client.engine import EngineError, open_engine
from fedmpt.protocol.manifest import BundleError


@pytest.fixture(scope="module")
def engine(tiny_bundle):
    return open_engine(tiny_bundle, "onnx", "cpu", threads=1)


def test_gradients_are_the_slopes_of_the_loss(engine, state, draw_batch):
    tokens, labels = draw_batch(8)
    # Moving along a random direction must change the loss by its inner product with the gradient. What detaches
    # the transport plan moves the loss too, so only κ and δ (which the plan does not see) are exact.
    for name in ("scale", "bias"):
        _, gradients = engine.train_step(state, tokens, labels)
        step = np.float32(1e-2)
        up, _ = engine.train_step({**state, name: state[name] + step}, tokens, labels)
        down, _ = engine.train_step({**state, name: state[name] - step}, tokens, labels)
        assert gradients[name] == pytest.approx((up - down) / (2 * step), rel=1e-2, abs=1e-5)


def test_a_step_along_the_gradient_lowers_the_loss(engine, state, draw_batch):
    tokens, labels = draw_batch(8)
    loss, gradients = engine.train_step(state, tokens, labels)
    norm = np.sqrt(sum(float((value**2).sum()) for value in gradients.values()))
    moved = {name: value - np.float32(0.01 / norm) * gradients[name] for name, value in state.items()}
    assert engine.train_step(moved, tokens, labels)[0] < loss


def test_there_is_a_gradient_of_the_right_shape_for_every_tensor(engine, state, draw_batch):
    loss, gradients = engine.train_step(state, *draw_batch(8))
    assert isinstance(loss, float)
    assert {name: value.shape for name, value in gradients.items()} == {
        name: value.shape for name, value in state.items()
    }


def test_a_short_batch_equals_itself_with_unlabelled_photos(engine, state, draw_batch):
    tokens, labels = draw_batch(8)
    labels[5:] = -1
    whole, part = engine.train_step(state, tokens, labels), engine.train_step(state, tokens[:5], labels[:5])
    assert part[0] == pytest.approx(whole[0], rel=1e-6)
    for name in state:
        np.testing.assert_allclose(part[1][name], whole[1][name], rtol=1e-4, atol=1e-7)


def test_what_filled_the_buffer_before_does_not_matter(tiny_bundle, state, draw_batch):
    tokens, labels = draw_batch(3)
    fresh = open_engine(tiny_bundle, "onnx", "cpu", threads=1)
    used = open_engine(tiny_bundle, "onnx", "cpu", threads=1)
    used.train_step(state, *draw_batch(8, seed=1))
    first, second = (item.train_step(state, tokens, labels) for item in (fresh, used))
    assert first[0] == second[0]
    assert all(np.array_equal(first[1][name], second[1][name]) for name in state)


def test_the_head_gives_calibrated_logits_and_plans_that_sum_to_one(engine, manifest, state, draw_batch):
    tokens, _ = draw_batch(3)
    output = engine.head(state, engine.text_features(state), tokens)
    labels, patches = len(manifest.labels), manifest.tokens.count - 1
    assert (output.scores.shape, output.plan.shape) == ((3, labels), (3, labels, patches))
    np.testing.assert_allclose(output.logits, state["scale"] * output.scores + state["bias"], rtol=1e-5)
    np.testing.assert_allclose(output.plan.sum(axis=2), 1, rtol=1e-4)


def test_a_state_of_another_bundle_is_refused_with_the_missing_names(engine, state, draw_batch):
    without = {name: value for name, value in state.items() if name != "class_context"}
    with pytest.raises(EngineError, match="needs class_context"):
        engine.train_step(without, *draw_batch(2))


def test_a_batch_beyond_a_fixed_one_is_refused(tiny_bundle, manifest, state, draw_batch):
    graph = manifest.graphs["train_step"]
    labels = dataclasses.replace(graph.inputs["labels"], shape=(4, len(manifest.labels)))
    fixed = dataclasses.replace(graph, inputs={**graph.inputs, "labels": labels})
    from fedmpt.edge_client.onnx_engine import OnnxEngine

    changed = dataclasses.replace(manifest, graphs={**manifest.graphs, "train_step": fixed})
    with pytest.raises(EngineError, match="a batch of 5 photos, but the bundle's train step takes 4"):
        OnnxEngine(tiny_bundle, changed, "cpu", 1).train_step(state, *draw_batch(5))


def test_unknown_engines_and_folders_without_a_bundle_are_refused(tmp_path):
    with pytest.raises(EngineError, match="use one of onnx, torch"):
        open_engine(tmp_path, "jax")
    with pytest.raises(BundleError, match=r"manifest\.json: not found"):
        open_engine(tmp_path, "onnx")


def test_the_number_of_threads_does_not_change_a_bit(tiny_bundle, state, draw_batch):
    tokens, labels = draw_batch(8)
    results = [
        open_engine(tiny_bundle, "onnx", "cpu", threads).train_step(state, tokens, labels)
        for threads in (1, 2)
    ]
    assert results[0][0] == results[1][0]
    assert all(np.array_equal(results[0][1][name], results[1][1][name]) for name in state)
