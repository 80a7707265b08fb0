"""The method's tensor operations in plain PyTorch: the definition, the CPU path and the oracle of the kernels.

Shapes: B images, M patches, D joint width, N conditions, C labels, r adapter rank. Everything is computed
in float32 (float64 where an input is float64), and nothing depends on the values of a tensor, so that
``make_fx`` traces each function into the graphs of a bundle.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

POOLINGS = ("transport", "softmax", "max")

SCALING_REG = 0.02
"""Smallest λ for which Sinkhorn may scale ``exp(−K/λ)`` itself. Costs lie in [0, 1], so centred exponents lie
within ±1/2λ, and (each half step being non-expansive in the logarithm, and both marginals of one mass) every
intermediate within exp(±1.5/λ) times C, however many iterations: float32 holds that up to 1/λ = 50. Below it,
the logarithms are iterated."""


def region_transport(
    tokens: Tensor,
    text: Tensor,
    *,
    logit_scale: float,
    tau: float,
    reg: float,
    iterations: int,
    pooling: str = "transport",
    adapters: tuple[Tensor, Tensor] | None = None,
    return_plan: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Pool the similarity of every patch to every label of every condition into one score each.

    ψ[b,n,c] = C · Σ_m P[b,n,m,c] · cos(z_m, t_nc), where the plan P has column sums 1/C: the entropic
    transport plan for the cost 1 − softmax_c(ℓ/τ), ℓ = logit_scale · cos, with row marginal
    softmax_m(max_c ℓ/τ) (``transport``); softmax_m(ℓ/τ)/C (``softmax``); or the best patch (``max``).
    No gradient flows through P.

    Args:
        tokens: L2-normalised patches, [B, M, D], or [B, N, M, D] if they differ between conditions.
        text: L2-normalised text features, [N, C, D].
        logit_scale: CLIP's logit scale s, exponentiated.
        tau: temperature τ of cost and row marginal.
        reg: entropic regularisation λ.
        iterations: Sinkhorn iterations, each a row update followed by a column update.
        pooling: one of ``POOLINGS``.
        adapters: (down [N, r, D], up [N, D, r]): patches become normalise(z + up·down·z).
        return_plan: also return P, [B, N, M, C].

    Returns:
        ψ [B, N, C], or (ψ, P).
    """
    dtype = _compute_dtype(tokens, text)
    tokens, text = tokens.to(dtype), text.to(dtype)
    cosine = similarity(tokens, text)
    if adapters is not None:
        down, up = (adapter.to(dtype) for adapter in adapters)
        hidden, folded, inverse_norm = adapter_terms(tokens, text, down, up)
        cosine = (cosine + hidden @ folded.transpose(1, 2)) * inverse_norm[..., None]
    detached = cosine.detach()
    if pooling == "transport":
        weights = transport_weights(detached * (logit_scale / tau), reg, iterations)
    elif pooling == "softmax":
        weights = (detached * (logit_scale / tau)).softmax(2)
    else:
        patches = torch.arange(cosine.shape[2], device=cosine.device)[:, None]
        weights = (patches == detached.argmax(2, keepdim=True)).to(dtype)
    psi = (weights * cosine).sum(2)
    return (psi, weights / weights.shape[3]) if return_plan else psi


def similarity(tokens: Tensor, text: Tensor) -> Tensor:
    """Inner products [B, N, M, C] of tokens [B, M, D] or [B, N, M, D] with text [N, C, D]."""
    if tokens.dim() == 4:
        return tokens @ text.transpose(1, 2)
    # One large product, then one copy: a broadcast batch of small ones is several times slower on a CPU.
    product = (tokens @ text.flatten(0, 1).T).reshape(*tokens.shape[:2], *text.shape[:2])
    return product.transpose(1, 2).contiguous()


def adapter_terms(
    tokens: Tensor,
    text: Tensor,
    down: Tensor,
    up: Tensor,
    products: Callable[[Tensor, Tensor], Tensor] = similarity,
) -> tuple[Tensor, Tensor, Tensor]:
    """What turns z·t into normalise(z + up·down·z)·t without forming the adapted tokens [B, N, M, D].

    With h = down·z: (z + up·h)·t = z·t + h·(upᵀt) and |z + up·h|² = |z|² + h·(2·upᵀz + upᵀup·h).

    Args:
        products: how tokens are multiplied with down and upᵀ.

    Returns:
        h [B, N, M, r], upᵀt [N, C, r], and 1/|z + up·h| [B, N, M].
    """
    hidden, projected = products(tokens, down), products(tokens, up.transpose(1, 2))
    squares = torch.linalg.vector_norm(tokens, dim=-1, dtype=hidden.dtype).square()
    change = hidden * (2 * projected + hidden @ (up.transpose(1, 2) @ up))
    square_norm = (squares if tokens.dim() == 4 else squares[:, None]) + change.sum(-1)
    return hidden, text @ up, square_norm.clamp_min(1e-12).rsqrt()


def transport_weights(scaled: Tensor, reg: float, iterations: int) -> Tensor:
    """C times the transport plan for similarities ℓ/τ [B, N, M, C]: columns sum to 1 over the patches."""
    # Both marginals have the total mass C: else the duals would drift apart by ln C in every iteration.
    row = scaled.amax(3).log_softmax(2)[..., None] + math.log(scaled.shape[3])  # [B, N, M, 1]
    affinity = (scaled.softmax(3) - 0.5) / reg  # −K/λ, centred
    if reg >= SCALING_REG:
        return _sinkhorn_scaling(affinity.exp(), row.exp(), iterations)
    column = torch.zeros_like(affinity[:, :, :1])
    for _ in range(iterations):
        u = row - (affinity + column).logsumexp(3, keepdim=True)
        column = -(affinity + u).logsumexp(2, keepdim=True)
    return (affinity + u + column).exp()


def _sinkhorn_scaling(kernel: Tensor, row: Tensor, iterations: int) -> Tensor:
    """Sinkhorn's iterations on the scalings themselves, as products with kernel [B, N, M, C]."""
    column = torch.ones_like(kernel[:, :, :1])  # [B, N, 1, C]
    for _ in range(iterations):
        u = row / (kernel @ column.transpose(2, 3))
        column = 1 / (u.transpose(2, 3) @ kernel)
    return kernel * u * column


def asymmetric_loss(
    logits: Tensor, labels: Tensor, *, gamma_pos: float, gamma_neg: float, clip: float
) -> Tensor:
    """Asymmetric loss (Ridnik et al. 2021) with unknown labels, as a scalar.

    −[y (1−p)^γ₊ log p + (1−y) q^γ₋ log(1−q)], p = σ(x), q = max(p − clip, 0), summed over the known labels
    of an image and averaged over the images that have any; 0 if none has.

    Args:
        logits: x, [B, C].
        labels: [B, C]: 1 present, 0 absent, −1 unknown (no loss, and a gradient of exactly 0).
        gamma_pos, gamma_neg: focusing exponents, at least 0.
        clip: probability margin in [0, 1) below which a negative costs nothing.
    """
    dtype = _compute_dtype(logits)
    labels = labels.to(dtype)
    known = labels >= 0
    x = logits.to(dtype).where(known, 0.0)  # before anything that an infinite logit could turn into NaN
    log_p, log_not_p = F.logsigmoid(x), F.logsigmoid(-x)
    positive = (gamma_pos * log_not_p).exp() * log_p
    if clip > 0:
        # The floor is 0 to float32 in the loss, and keeps powers below 1 differentiable.
        q = (log_p.exp() - clip).clamp_min(1e-12)
        negative = q**gamma_neg * (1 - q).log()
    else:
        negative = (gamma_neg * log_p).exp() * log_not_p
    per_label = torch.where(labels > 0, positive, negative).where(known, 0.0)
    images = known.any(1).sum().clamp_min(1)
    return -per_label.sum() / images


def gated_asymmetric_loss(
    psi: Tensor,
    gate: Tensor,
    scale: Tensor,
    bias: Tensor,
    labels: Tensor,
    *,
    gamma_pos: float,
    gamma_neg: float,
    clip: float,
) -> Tensor:
    """Asymmetric loss of the logits scale · Σ_n gate[b,n] ψ[b,n,c] + bias.

    Args:
        psi: scores per condition, [B, N, C].
        gate: weights of the conditions, [B, N].
        scale, bias: scalars.
        labels, gamma_pos, gamma_neg, clip: as in ``asymmetric_loss``.
    """
    dtype = _compute_dtype(psi, gate, scale, bias)
    mixed = (gate.to(dtype)[..., None] * psi.to(dtype)).sum(1)
    logits = scale.to(dtype) * mixed + bias.to(dtype)
    return asymmetric_loss(logits, labels, gamma_pos=gamma_pos, gamma_neg=gamma_neg, clip=clip)


def _compute_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
