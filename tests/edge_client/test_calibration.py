"""Fitting κ and δ: the loss against PyTorch's autograd, the fit against a brute-force search."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fedmpt.edge_client.calibration import PRIOR, asymmetric_loss, fit_scale_and_bias
from fedmpt.kernels import reference


def _constants(gamma_pos=1.0, gamma_neg=2.0, clip=0.05):
    return SimpleNamespace(gamma_pos=gamma_pos, gamma_neg=gamma_neg, clip=clip)


def _problem(seed=0, count=60, labels=5):
    """Scores like cosines, labels that follow them noisily, a fifth of them unknown."""
    random = np.random.default_rng(seed)
    scores = random.normal(0.2, 0.05, size=(count, labels)).astype(np.float32)
    truth = (scores + random.normal(0, 0.03, size=scores.shape) > 0.24).astype(np.int8)
    truth[random.random(truth.shape) < 0.2] = -1
    return scores, truth


@pytest.mark.parametrize("constants", [(1, 2, 0.05), (0, 4, 0.05), (0, 0, 0), (2, 1, 0.2), (0.5, 0.5, 0.1)])
def test_loss_and_slope_equal_the_reference_of_the_kernels(constants):
    random, training = np.random.default_rng(1), _constants(*constants)
    logits = np.concatenate([np.linspace(-15, 15, 400), random.normal(0, 3, 400)]).reshape(100, 8)
    labels = random.integers(-1, 2, size=logits.shape)
    known, images = labels >= 0, int((labels >= 0).any(axis=1).sum())
    x = torch.tensor(logits, requires_grad=True)
    expected = reference.asymmetric_loss(x, torch.tensor(labels), **vars(training))
    expected.backward()
    losses, slopes = asymmetric_loss(logits, labels == 1, training)
    assert losses[known].sum() / images == pytest.approx(expected.item(), rel=1e-9)
    np.testing.assert_allclose(np.where(known, slopes, 0) / images, x.grad.numpy(), rtol=1e-7, atol=1e-12)


def test_extreme_logits_give_finite_losses():
    for logits in (np.full(2, 1e4), np.full(2, -1e4)):
        loss, slope = asymmetric_loss(logits, np.array([True, False]), _constants(0, 0, 0))
        assert np.isfinite(loss).all()
        assert np.isfinite(slope).all()


def _loss_at(scale, bias, scores, labels, training):
    known = labels >= 0
    loss, _ = asymmetric_loss(scale * scores[known].astype(np.float64) + bias, labels[known] == 1, training)
    return loss.sum() / known.any(axis=1).sum()


def test_the_fit_is_the_minimum_of_a_grid_around_it():
    scores, labels = _problem()
    scale, bias, loss = fit_scale_and_bias(scores, labels, 10.0, -2.0, _constants())
    assert loss == pytest.approx(_loss_at(scale, bias, scores, labels, _constants()))
    mean = float(scores[labels >= 0].mean())
    # The grid moves slope and level apart; the pull towards the start may cost PRIOR·|move|²/2 at most.
    slack = PRIOR * 100
    for factor in np.linspace(0.5, 2, 16):
        for shift in np.linspace(-2, 2, 17):
            moved = bias + (1 - factor) * scale * mean + shift
            assert _loss_at(factor * scale, moved, scores, labels, _constants()) >= loss - slack


def test_a_wrong_start_is_repaired():
    scores, labels = _problem()
    before = _loss_at(10.0, -2.0, scores, labels, _constants())
    *_, after = fit_scale_and_bias(scores, labels, 10.0, -2.0, _constants())
    assert after < 0.7 * before


def test_the_fit_hardly_depends_on_the_start():
    scores, labels = _problem()
    fits = [
        fit_scale_and_bias(scores, labels, scale, bias, _constants())[:2]
        for scale, bias in ((1.0, 0.0), (100.0, -20.0))
    ]
    np.testing.assert_allclose(fits[0], fits[1], rtol=0.1)


@pytest.mark.parametrize("value", [0, 1])
def test_labels_of_one_kind_give_finite_values(value):
    scores, labels = _problem()
    scale, bias, loss = fit_scale_and_bias(scores, np.full_like(labels, value), 10.0, -2.0, _constants())
    assert abs(scale) < 1e3
    assert abs(bias) < 1e3
    assert np.isfinite(loss)


def test_equal_scores_move_the_level_alone():
    scores, labels = np.full((10, 2), 0.25, np.float32), np.tile(np.array([1, 0], np.int8), (10, 1))
    scale, bias, _ = fit_scale_and_bias(scores, labels, 10.0, 3.0, _constants(0, 0, 0))
    assert scale * 0.25 + bias == pytest.approx(0.0, abs=0.02)


def test_two_fits_are_bit_identical():
    scores, labels = _problem()
    fits = [fit_scale_and_bias(scores, labels, 10.0, -2.0, _constants()) for _ in range(2)]
    assert fits[0] == fits[1]
