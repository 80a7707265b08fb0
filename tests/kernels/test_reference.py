"""The reference is held to the method's formulas, written naively in float64, and to finite differences."""

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from fedmpt.kernels import reference

PAPER = {"logit_scale": 100.0, "tau": 4.0, "reg": 0.2, "iterations": 10}
LOSS = {"gamma_pos": 1.0, "gamma_neg": 2.0, "clip": 0.05}


def features(
    b: int = 3, n: int = 2, m: int = 13, c: int = 5, d: int = 24, *, spread: float = 1.0, dtype=torch.float64
) -> tuple[Tensor, Tensor]:
    """Patches and text features around one common direction; a smaller ``spread`` makes cosines more alike."""
    generator = torch.Generator().manual_seed(b + 10 * n + 100 * m + 1000 * c)
    common = torch.randn(d, generator=generator, dtype=torch.float64)
    tokens = common + spread * torch.randn(b, m, d, generator=generator, dtype=torch.float64)
    text = common + spread * torch.randn(n, c, d, generator=generator, dtype=torch.float64)
    return normalize(tokens, dim=-1).to(dtype), normalize(text, dim=-1).to(dtype)


def low_rank(n: int, r: int, d: int, dtype=torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(r)
    down = torch.randn(n, r, d, generator=generator, dtype=torch.float64) / d**0.5
    up = torch.randn(n, d, r, generator=generator, dtype=torch.float64) / r**0.5
    return down.to(dtype), up.to(dtype)


def naive_plan(cosine: np.ndarray, s: float, tau: float, reg: float, iterations: int) -> np.ndarray:
    """One image, one condition: cosine [M, C] to the plan, term by term in the log domain."""
    patches, labels = cosine.shape
    scaled = s / tau * cosine
    log_softmax = scaled - np.logaddexp.reduce(scaled, axis=1, keepdims=True)
    cost = 1 - np.exp(log_softmax)
    log_a = scaled.max(1) - np.logaddexp.reduce(scaled.max(1))
    f, g = np.zeros(patches), np.zeros(labels)
    for _ in range(iterations):
        f = log_a - np.logaddexp.reduce(-cost / reg + g[None, :], axis=1)
        g = -np.log(labels) - np.logaddexp.reduce(-cost / reg + f[:, None], axis=0)
    return np.exp(-cost / reg + f[:, None] + g[None, :])


@pytest.mark.parametrize("reg", [0.2, reference.SCALING_REG, 0.019, 0.005])
@pytest.mark.parametrize("s", [13.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_plan_equals_the_naive_one_in_both_domains(s: float, reg: float, dtype: torch.dtype) -> None:
    tokens, text = features(spread=0.7)
    cosine = torch.einsum("bmd,ncd->bnmc", tokens, text).numpy()
    options = PAPER | {"logit_scale": s, "reg": reg}
    psi, plan = reference.region_transport(tokens.to(dtype), text.to(dtype), return_plan=True, **options)
    for b, n in itertools.product(range(3), range(2)):
        exact = naive_plan(cosine[b, n], s, PAPER["tau"], reg, PAPER["iterations"])
        tolerance = 1e-10 if dtype == torch.float64 else 1e-4
        np.testing.assert_allclose(plan[b, n].numpy(), exact, rtol=tolerance, atol=tolerance * exact.max())
        np.testing.assert_allclose(psi[b, n], 5 * (exact * cosine[b, n]).sum(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reg", [0.2, reference.SCALING_REG, 0.005])
@pytest.mark.parametrize(("c", "iterations"), [(20, 50), (80, 50), (365, 200)])
def test_many_labels_and_iterations_lose_no_precision(reg: float, c: int, iterations: int) -> None:
    tokens, text = features(b=1, n=1, m=29, c=c, dtype=torch.float32)
    options = PAPER | {"reg": reg, "iterations": iterations}
    _, plan = reference.region_transport(tokens, text, return_plan=True, **options)
    cosine = torch.einsum("bmd,ncd->bnmc", tokens.double(), text.double())[0, 0].numpy()
    exact = naive_plan(cosine, PAPER["logit_scale"], PAPER["tau"], reg, iterations)
    np.testing.assert_allclose(plan[0, 0].numpy(), exact, rtol=1e-3, atol=1e-4 * exact.max())


@pytest.mark.parametrize("tau", [1.0, 0.5, 0.1])
def test_sharp_costs_do_not_underflow_at_the_smallest_scaled_reg(tau: float) -> None:
    tokens, text = features(b=2, m=197, c=20, d=64, dtype=torch.float32)
    options = PAPER | {"tau": tau, "reg": reference.SCALING_REG}
    psi, exact = (
        reference.region_transport(tokens.to(dtype), text.to(dtype), **options)
        for dtype in (torch.float32, torch.float64)
    )
    assert (psi - exact).abs().max() < 5e-5


@pytest.mark.parametrize("pooling", reference.POOLINGS)
@pytest.mark.parametrize("reg", [0.2, 0.005])
def test_columns_of_every_plan_sum_to_one_over_c(pooling: str, reg: float) -> None:
    tokens, text = features(dtype=torch.float32)
    options = PAPER | {"reg": reg, "iterations": 1}
    _, plan = reference.region_transport(tokens, text, pooling=pooling, return_plan=True, **options)
    torch.testing.assert_close(plan.sum(2), torch.full((3, 2, 5), 0.2), rtol=0, atol=1e-6)


def test_rows_meet_the_patch_importance_at_the_papers_values() -> None:
    tokens, text = features(b=4, n=5, m=196, c=20, d=64, dtype=torch.float32)
    _, plan = reference.region_transport(tokens, text, return_plan=True, **PAPER)
    scaled = torch.einsum("bmd,ncd->bnmc", tokens, text) * 25
    total_variation = (plan.sum(3) - scaled.amax(3).softmax(2)).abs().sum(2) / 2
    assert total_variation.max() < 1e-3


def test_softmax_pooling_is_the_weighted_mean_and_max_the_best_patch() -> None:
    tokens, text = features()
    cosine = torch.einsum("bmd,ncd->bnmc", tokens, text)
    softmax = reference.region_transport(tokens, text, pooling="softmax", **PAPER)
    torch.testing.assert_close(softmax, ((25 * cosine).softmax(2) * cosine).sum(2))
    best = reference.region_transport(tokens, text, pooling="max", **PAPER)
    torch.testing.assert_close(best, cosine.amax(2), rtol=0, atol=1e-15)


def test_a_tie_between_patches_gives_the_whole_gradient_to_the_first() -> None:
    tokens, text = features(b=1, n=1, m=2, c=1)
    tokens = tokens[:, :1].repeat(1, 2, 1).requires_grad_()
    reference.region_transport(tokens, text, pooling="max", **PAPER).sum().backward()
    torch.testing.assert_close(tokens.grad[0, 0], text[0, 0])
    assert not tokens.grad[0, 1].any()


@pytest.mark.parametrize("pooling", reference.POOLINGS)
@pytest.mark.parametrize("adapted", [False, True])
def test_gradients_equal_finite_differences_with_the_plan_held(pooling: str, adapted: bool) -> None:
    tokens, text = features(b=2, n=2, m=4, c=3, d=6)
    inputs = [tokens, text, *(low_rank(2, 3, 6) if adapted else ())]

    def score(*values: Tensor) -> Tensor:
        return reference.region_transport(
            *values[:2], pooling=pooling, adapters=values[2:] or None, **PAPER | {"logit_scale": 8.0}
        )

    _, plan = reference.region_transport(
        tokens,
        text,
        pooling=pooling,
        adapters=tuple(inputs[2:]) or None,
        return_plan=True,
        **PAPER | {"logit_scale": 8.0},
    )
    upstream = torch.randn(2, 2, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def held(z: Tensor, t: Tensor, down: Tensor | None = None, up: Tensor | None = None) -> Tensor:
        z = z[:, None]
        if down is not None:
            z = normalize(z + (z @ down.transpose(1, 2)) @ up.transpose(1, 2), dim=-1)
        return (3 * plan * (z @ t.transpose(1, 2))).sum(2).mul(upstream).sum()

    variables = [value.clone().requires_grad_() for value in inputs]
    gradients = torch.autograd.grad((score(*variables) * upstream).sum(), variables)
    for index, (value, gradient) in enumerate(zip(inputs, gradients, strict=True)):
        numeric = torch.zeros_like(value)
        for place in itertools.product(*map(range, value.shape)):
            moved = [held(*_moved(inputs, index, place, step)) for step in (1e-6, -1e-6)]
            numeric[place] = (moved[0] - moved[1]) / 2e-6
        torch.testing.assert_close(gradient, numeric, rtol=1e-6, atol=1e-8)


def _moved(inputs: list[Tensor], index: int, place: tuple[int, ...], step: float) -> list[Tensor]:
    values = [value.clone() for value in inputs]
    values[index][place] += step
    return values


@pytest.mark.parametrize("per_condition", [False, True])
def test_adapters_equal_the_adapted_and_renormalised_tokens(per_condition: bool) -> None:
    tokens, text = features(n=2)
    if per_condition:
        tokens = torch.stack([tokens, tokens.flip(1)], 1)
    down, up = low_rank(2, 7, 24)
    z = tokens if per_condition else tokens[:, None]
    adapted = normalize(z + torch.einsum("ndr,nre,bnme->bnmd", up, down, z.expand(-1, 2, -1, -1)), dim=-1)
    found = reference.region_transport(tokens, text, adapters=(down, up), return_plan=True, **PAPER)
    expected = reference.region_transport(adapted, text, return_plan=True, **PAPER)
    torch.testing.assert_close(found, expected)


def test_tokens_per_condition_equal_one_call_per_condition() -> None:
    tokens, text = features(n=2)
    both = torch.stack([tokens, tokens.flip(0)], 1)
    found = reference.region_transport(both, text, **PAPER)
    for n in range(2):
        alone = reference.region_transport(both[:, n], text[n : n + 1], **PAPER)
        torch.testing.assert_close(found[:, n : n + 1], alone)


@pytest.mark.parametrize("pooling", reference.POOLINGS)
@pytest.mark.parametrize("reg", [0.2, reference.SCALING_REG, 0.005])
@pytest.mark.parametrize(
    "case", ["outstanding patch", "identical labels", "one label", "opposite patches", "equal"]
)
def test_extremes_stay_finite_and_equal_float64(case: str, pooling: str, reg: float) -> None:
    tokens, text = features(b=2, n=2, m=9, c=1 if case == "one label" else 4, d=16)
    if case == "outstanding patch":
        tokens, text = tokens * 1e-3, text.clone()
        tokens[:, 4] = text[0, 2]
    elif case == "identical labels":
        text = torch.cat([text[:, :1], text[:, :1], text[:, 2:]], 1)
    elif case == "opposite patches":
        tokens = torch.cat([text[:1, :1].expand(2, 4, 16), -text[:1, :1].expand(2, 5, 16)], 1)
    elif case == "equal":
        tokens = text[:1, :1].expand(2, 9, 16)
    options = {"logit_scale": 100.0, "tau": 1.0, "reg": reg, "iterations": 10, "pooling": pooling}
    text32 = text.float().requires_grad_()
    psi, plan = reference.region_transport(tokens.float(), text32, return_plan=True, **options)
    _, exact = reference.region_transport(
        tokens.float().double(), text32.double(), return_plan=True, **options
    )
    psi.sum().backward()
    assert psi.isfinite().all()
    assert plan.isfinite().all()
    assert text32.grad.isfinite().all()
    torch.testing.assert_close(plan.sum(2).double(), exact.sum(2), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(plan.double(), exact.double(), rtol=5e-3, atol=1e-4)


def naive_loss(x: np.ndarray, y: np.ndarray, gamma_pos: float, gamma_neg: float, clip: float) -> float:
    images = []
    for row, label_row in zip(x, y, strict=True):
        terms = []
        for logit, label in zip(row, label_row, strict=True):
            p = 1 / (1 + np.exp(-logit))
            q = max(p - clip, 0)
            if label == 1:
                terms.append(-((1 - p) ** gamma_pos) * np.log(p))
            elif label == 0:
                terms.append(-(q**gamma_neg) * np.log(1 - q))
        if terms:
            images.append(sum(terms))
    return sum(images) / max(len(images), 1)


def logits_and_labels(b: int = 6, c: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(c)
    labels = torch.randint(-1, 2, (b, c), generator=generator, dtype=torch.int8)
    labels[1] = -1
    return 3 * torch.randn(b, c, generator=generator, dtype=torch.float64), labels


@pytest.mark.parametrize("gamma_pos", [0.0, 1.0, 2.5])
@pytest.mark.parametrize("gamma_neg", [0.0, 2.0, 4.0])
@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_loss_and_gradient_equal_the_naive_sum(gamma_pos: float, gamma_neg: float, clip: float) -> None:
    logits, labels = logits_and_labels()
    logits.requires_grad_()
    loss = reference.asymmetric_loss(logits, labels, gamma_pos=gamma_pos, gamma_neg=gamma_neg, clip=clip)
    x, y = logits.detach().numpy(), labels.numpy()
    assert loss.item() == pytest.approx(naive_loss(x, y, gamma_pos, gamma_neg, clip), rel=1e-10)
    (gradient,) = torch.autograd.grad(loss, logits)
    for place in itertools.product(*map(range, x.shape)):
        step = np.zeros_like(x)
        step[place] = 1e-6
        rise = naive_loss(x + step, y, gamma_pos, gamma_neg, clip) - naive_loss(
            x - step, y, gamma_pos, gamma_neg, clip
        )
        assert gradient[place].item() == pytest.approx(rise / 2e-6, rel=1e-5, abs=1e-8)


def test_loss_without_a_known_label_is_zero_with_zero_gradient() -> None:
    logits = torch.randn(2, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = reference.asymmetric_loss(logits, torch.full((2, 3), -1, dtype=torch.int8), **LOSS)
    loss.backward()
    assert loss.item() == 0
    assert not logits.grad.any()


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan"), 1e30])
def test_an_unknown_label_hides_any_logit(bad: float) -> None:
    logits = torch.tensor([[bad, 0.3]], requires_grad=True)
    loss = reference.asymmetric_loss(logits, torch.tensor([[-1, 1]], dtype=torch.int8), **LOSS)
    loss.backward()
    alone = reference.asymmetric_loss(torch.tensor([[0.3]]), torch.tensor([[1]]), **LOSS)
    assert loss.item() == alone.item()
    assert logits.grad[0, 0].item() == 0


@pytest.mark.parametrize("magnitude", [20.0, 90.0, 1e4])
@pytest.mark.parametrize("gammas", [(1.0, 2.0), (0.0, 0.0), (0.5, 0.5)])
@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_loss_and_gradient_are_finite_at_any_finite_logit(
    magnitude: float, gammas: tuple[float, float], clip: float
) -> None:
    logits = torch.tensor([[magnitude, -magnitude] * 2], requires_grad=True)
    labels = torch.tensor([[1, 1, 0, 0]], dtype=torch.int8)
    loss = reference.asymmetric_loss(logits, labels, gamma_pos=gammas[0], gamma_neg=gammas[1], clip=clip)
    loss.backward()
    assert loss.isfinite()
    assert logits.grad.isfinite().all()


def test_gated_loss_equals_the_loss_of_the_mixed_logits() -> None:
    _, labels = logits_and_labels()
    generator = torch.Generator().manual_seed(2)
    psi = torch.randn(6, 4, 7, generator=generator, dtype=torch.float64)
    gate = torch.randn(6, 4, generator=generator, dtype=torch.float64).softmax(1)
    scale, bias = torch.tensor(3.0, dtype=torch.float64), torch.tensor(-0.5, dtype=torch.float64)
    inputs = [value.requires_grad_() for value in (psi, gate, scale, bias)]
    found = reference.gated_asymmetric_loss(*inputs, labels, **LOSS)
    expected = reference.asymmetric_loss(torch.einsum("bn,bnc->bc", gate, psi) * scale + bias, labels, **LOSS)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, inputs), torch.autograd.grad(expected, inputs))
