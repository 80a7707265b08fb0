"""The fused loss on Triton against float64: value and every gradient."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fedmpt.kernels import dispatch, reference
from fedmpt.kernels import triton_asymmetric_loss as loss

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
LOSS: dict[str, Any] = {"gamma_pos": 1.0, "gamma_neg": 2.0, "clip": 0.05}

pytestmark = pytest.mark.usefixtures("poisoned")


def inputs_of(b: int, n: int, c: int, dtype: torch.dtype, device: str) -> tuple[list[Tensor], Tensor]:
    """ψ, gate, scale and bias, which require gradients, and labels; image 0 has no known label."""
    generator = torch.Generator().manual_seed(b + 10 * n + 100 * c)
    psi = torch.randn(b, n, c, generator=generator).to(dtype)
    gate = torch.randn(b, n, generator=generator).softmax(1)
    labels = torch.randint(-1, 2, (b, c), generator=generator, dtype=torch.int8)
    labels[0] = -1
    values = [psi, gate, torch.tensor(4.0), torch.tensor(-1.0)]
    return [value.to(device).requires_grad_() for value in values], labels.to(device)


def run(function: Any, inputs: list[Tensor], labels: Tensor, options: dict[str, Any]) -> list[Tensor]:
    value = function(*inputs, labels, **options)
    return [value.detach(), *torch.autograd.grad(value, inputs, torch.tensor(-0.7).to(value))]


def assert_equals_float64(inputs: list[Tensor], labels: Tensor, options: dict[str, Any] = LOSS) -> None:
    exact = run(
        reference.gated_asymmetric_loss,
        [v.detach().double().requires_grad_() for v in inputs],
        labels,
        options,
    )
    found = run(loss.gated_asymmetric_loss, inputs, labels, options)
    for name, kernel, truth in zip(("loss", "psi", "gate", "scale", "bias"), found, exact, strict=True):
        limit = TOLERANCE[inputs[0].dtype] * truth.abs().max() + 1e-12
        error = (kernel.double() - truth).abs().max()
        assert error <= limit, f"{name}: error {error:.2e} above {limit:.2e} (NaN: not written)"


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("b", [2, 7])
@pytest.mark.parametrize(("n", "c"), [(1, 1), (5, 20), (3, 127), (9, 40), (4, 129), (17, 300), (33, 33)])
def test_loss_and_gradients_at_every_shape(dtype: torch.dtype, b: int, n: int, c: int, device: str) -> None:
    assert_equals_float64(*inputs_of(b, n, c, dtype, device))


@pytest.mark.parametrize("gamma_pos", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("gamma_neg", [0.0, 0.5, 4.0])
@pytest.mark.parametrize("clip", [0.0, 0.05, 0.3])
def test_every_exponent_and_clip(gamma_pos: float, gamma_neg: float, clip: float, device: str) -> None:
    inputs, labels = inputs_of(3, 2, 9, torch.float32, device)
    assert_equals_float64(inputs, labels, {"gamma_pos": gamma_pos, "gamma_neg": gamma_neg, "clip": clip})


def test_the_mean_is_over_images_with_a_known_label_beyond_one_block(device: str) -> None:
    inputs, labels = inputs_of(loss.REDUCE_BLOCK + 1, 1, 2, torch.float32, device)
    assert_equals_float64(inputs, labels)


def test_no_known_label_gives_zero_and_zero_gradients(device: str) -> None:
    inputs, labels = inputs_of(3, 2, 5, torch.float32, device)
    found = run(loss.gated_asymmetric_loss, inputs, torch.full_like(labels, -1), LOSS)
    assert not any(value.any() for value in found)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_an_unknown_label_hides_any_score(bad: float, device: str) -> None:
    inputs, labels = inputs_of(3, 2, 5, torch.float32, device)
    expected = run(loss.gated_asymmetric_loss, inputs, labels, LOSS)
    hidden = (labels < 0)[:, None].expand(inputs[0].shape)
    spoiled = [inputs[0].detach().masked_fill(hidden, bad).requires_grad_(), *inputs[1:]]
    found = run(loss.gated_asymmetric_loss, spoiled, labels, LOSS)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("magnitude", [20.0, 90.0, 1e4])
@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_any_finite_logit_gives_finite_results(magnitude: float, clip: float, device: str) -> None:
    logits = torch.tensor([[magnitude, -magnitude] * 2], device=device, requires_grad=True)
    labels = torch.tensor([[1, 1, 0, 0]], dtype=torch.int8, device=device)
    value = loss.asymmetric_loss(logits, labels, gamma_pos=1.0, gamma_neg=2.0, clip=clip)
    (gradient,) = torch.autograd.grad(value, logits)
    exact = reference.asymmetric_loss(logits.double(), labels, gamma_pos=1.0, gamma_neg=2.0, clip=clip)
    (exact_gradient,) = torch.autograd.grad(exact, logits)
    torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, exact_gradient, rtol=1e-5, atol=1e-6)


def test_plain_loss_equals_the_reference(device: str) -> None:
    (psi, *_), labels = inputs_of(6, 1, 7, torch.float32, device)
    logits = psi[:, 0].detach().requires_grad_()
    found, expected = (
        torch.autograd.grad(module.asymmetric_loss(logits, labels, **LOSS), logits)
        for module in (loss, reference)
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", [torch.int8, torch.int64, torch.float32])
def test_strided_scores_and_labels_of_any_dtype(kind: torch.dtype, device: str) -> None:
    inputs, labels = inputs_of(4, 3, 5, torch.float16, device)
    psi = inputs[0].detach().permute(2, 0, 1).contiguous().permute(1, 2, 0).requires_grad_()
    assert not psi.is_contiguous()
    assert_equals_float64([psi, *inputs[1:]], labels.T.contiguous().T.to(kind))


def test_labels_between_the_three_count_by_their_sign_as_in_the_reference(device: str) -> None:
    psi, gate, scale, bias = inputs_of(2, 2, 4, torch.float32, device)[0]
    labels = torch.tensor([[0.5, -0.5, 0.0, 1.0], [-1.0, 2.0, 0.0, -3.0]], device=device)
    found, expected = (
        module.gated_asymmetric_loss(psi, gate, scale, bias, labels, **LOSS) for module in (loss, reference)
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("n", "dtype"), [(65, torch.float32), (2, torch.float64)])
def test_the_public_function_leaves_to_the_reference_what_the_kernels_do_not_take(
    n: int, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "_takes_triton", lambda tensor: True)  # as on CUDA
    monkeypatch.setattr(loss, "gated_asymmetric_loss", lambda *_, **__: pytest.fail("the kernels ran"))
    inputs, labels = inputs_of(2, n, 3, dtype, device)
    assert dispatch.gated_asymmetric_loss(*inputs, labels, **LOSS).dtype == dtype


def test_registered_operator_passes_torchs_own_checks(device: str) -> None:
    inputs, labels = inputs_of(3, 2, 5, torch.float32, device)
    torch.library.opcheck(torch.ops.fedmpt.gated_asymmetric_loss, (*inputs, labels, 1.0, 2.0, 0.05))
