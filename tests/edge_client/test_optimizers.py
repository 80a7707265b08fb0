"""The optimisers against PyTorch's own."""

import math

import numpy as np
import pytest
import torch

from fedmpt.edge_client.optimizers import OPTIMIZERS, clip_gradients, cosine_rate

STEPS = 7


def _trajectory(name, momentum, weight_decay):
    """The same random gradients through our optimiser and PyTorch's; both final values by name."""
    random = np.random.default_rng(5)
    state = {
        "context": random.normal(size=(4, 8)).astype(np.float32),
        "scale": np.asarray(7.0, np.float32),
    }
    rates = {"context": 0.01, "scale": 0.1}
    parameters = {key: torch.nn.Parameter(torch.tensor(value)) for key, value in state.items()}
    groups = [
        {"params": [parameters["context"]], "lr": 0.01, "weight_decay": weight_decay},
        {"params": [parameters["scale"]], "lr": 0.1, "weight_decay": 0.0},
    ]
    optimizer = (
        torch.optim.SGD(groups, momentum=momentum)
        if name == "sgd"
        else torch.optim.AdamW(groups, betas=(momentum, 0.999))
    )
    memory = {}
    for _ in range(STEPS):
        gradients = {key: random.normal(size=value.shape).astype(np.float32) for key, value in state.items()}
        state, memory = OPTIMIZERS[name](state, gradients, memory, rates, momentum, weight_decay)
        for key, parameter in parameters.items():
            parameter.grad = torch.tensor(gradients[key])
        optimizer.step()
    return state, {key: parameter.detach().numpy() for key, parameter in parameters.items()}


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_steps_equal_those_of_pytorch(name, momentum, weight_decay):
    ours, theirs = _trajectory(name, momentum, weight_decay)
    for key in ours:
        np.testing.assert_allclose(ours[key], theirs[key], rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_tensors_stay_float32_arrays_and_scalars_keep_no_dimensions(name):
    state, _ = _trajectory(name, 0.9, 0.1)
    assert {key: (type(value), value.dtype, value.shape) for key, value in state.items()} == {
        "context": (np.ndarray, np.float32, (4, 8)),
        "scale": (np.ndarray, np.float32, ()),
    }


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_step_leaves_its_inputs_alone(name):
    state, gradients = {"x": np.ones(3, np.float32)}, {"x": np.full(3, 2, np.float32)}
    OPTIMIZERS[name](state, gradients, {}, {"x": 0.1}, 0.9, 0.1)
    assert (state["x"] == 1).all()
    assert (gradients["x"] == 2).all()


def test_clipping_bounds_the_joint_norm_and_keeps_the_direction():
    gradients = {"a": np.array([3.0, 0.0], np.float32), "b": np.asarray(4.0, np.float32)}
    clipped = clip_gradients(gradients, 1.0)
    np.testing.assert_allclose(clipped["a"], [0.6, 0.0], rtol=1e-6)
    np.testing.assert_allclose(clipped["b"], 0.8, rtol=1e-6)


@pytest.mark.parametrize("maximum", [0.0, 5.0, 6.0])
def test_gradients_within_the_bound_or_without_one_are_unchanged(maximum):
    gradients = {"a": np.array([3.0, 0.0], np.float32), "b": np.asarray(4.0, np.float32)}
    assert clip_gradients(gradients, maximum) is gradients


def test_the_rate_falls_as_half_a_cosine_over_the_rounds():
    assert [cosine_rate(0.2, number, 4) for number in (1, 2, 3, 4)] == pytest.approx(
        [0.2, 0.1 * (1 + math.sqrt(0.5)), 0.1, 0.1 * (1 - math.sqrt(0.5))]
    )
