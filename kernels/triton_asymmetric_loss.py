"""Gate mixing, scale and bias, sigmoid and asymmetric loss on Triton: one program per image, one pass each way.

Importing this imports Triton. ``reference.gated_asymmetric_loss`` is the definition.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

REDUCE_BLOCK, WARPS = 256, 4
MAXIMUM_LABELS, MAXIMUM_ELEMENTS = 128, 2048  # of one block of ψ: it and its gradient stay in registers
CONDITION_BLOCKS = (8, 16, 32, 64)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@triton.jit
def log_sigmoid(b_x):
    """log σ(x), exact to float32 for every finite x."""
    return tl.minimum(b_x, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(b_x)))


@triton.jit
def label_losses(b_x, b_label, gamma_pos, gamma_neg, clip, CLIPPED: tl.constexpr):
    """Loss of each label and its derivative by the logit; 0 where the label is unknown."""
    b_log_p, b_log_not_p = log_sigmoid(b_x), log_sigmoid(-b_x)
    b_p, b_not_p = tl.exp(b_log_p), tl.exp(b_log_not_p)
    b_focus = tl.exp(gamma_pos * b_log_not_p)
    b_loss_pos = -b_focus * b_log_p
    b_dx_pos = b_focus * (gamma_pos * b_p * b_log_p - b_not_p)
    if CLIPPED:
        b_q = tl.maximum(b_p - clip, 1e-12)
        b_focus = tl.exp(gamma_neg * tl.log(b_q))
        b_log_rest = tl.log(1.0 - b_q)
        b_loss_neg = -b_focus * b_log_rest
        b_dq = b_focus * (1.0 / (1.0 - b_q) - gamma_neg * b_log_rest / b_q)
        b_dx_neg = tl.where(b_p - clip > 1e-12, b_dq * b_p * b_not_p, 0.0)
    else:
        b_focus = tl.exp(gamma_neg * b_log_p)
        b_loss_neg = -b_focus * b_log_not_p
        b_dx_neg = b_focus * (b_p - gamma_neg * b_not_p * b_log_not_p)
    b_loss = tl.where(b_label > 0, b_loss_pos, tl.where(b_label == 0, b_loss_neg, 0.0))
    b_dx = tl.where(b_label > 0, b_dx_pos, tl.where(b_label == 0, b_dx_neg, 0.0))
    return b_loss, b_dx


@triton.jit
def load_mixture(gate_ptr, scale_ptr, bias_ptr, image, N, BLOCK_N: tl.constexpr):
    """One image's gate [BLOCK_N], scale and bias."""
    n = tl.arange(0, BLOCK_N)
    b_gate = tl.load(gate_ptr + image * N + n, mask=n < N, other=0.0).to(tl.float32)
    return b_gate, tl.load(scale_ptr).to(tl.float32), tl.load(bias_ptr).to(tl.float32)


@triton.jit
def load_image(
    psi_ptr,
    label_ptr,
    image,
    start,
    N,
    C,
    stride_b,
    stride_n,
    stride_c,
    label_stride_b,
    label_stride_c,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """ψ [BLOCK_N, BLOCK_C] and labels [BLOCK_C] from ``start`` on; 0 for the ψ of unknown labels, even of NaN."""
    n, labels = tl.arange(0, BLOCK_N), start + tl.arange(0, BLOCK_C)
    in_c = labels < C
    b_label = tl.load(label_ptr + image * label_stride_b + labels * label_stride_c, mask=in_c, other=-1).to(
        tl.int32
    )
    places = psi_ptr + image * stride_b + n[:, None] * stride_n + labels[None, :] * stride_c
    b_psi = tl.load(places, mask=(n < N)[:, None] & (b_label >= 0)[None, :], other=0.0).to(tl.float32)
    return b_psi, b_label


@triton.jit
def loss_kernel(
    psi_ptr,  # [B, N, C] by its strides
    gate_ptr,  # [B, N]
    scale_ptr,  # []
    bias_ptr,  # []
    label_ptr,  # [B, C] by its strides, int8
    loss_ptr,  # [B]: sum over the known labels
    known_ptr,  # [B]: 1 where an image has a known label, else 0
    N,
    C,
    stride_b,
    stride_n,
    stride_c,
    label_stride_b,
    label_stride_c,
    gamma_pos,
    gamma_neg,
    clip,
    CLIPPED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Loss of one image."""
    image = tl.program_id(0).to(tl.int64)
    b_gate, scale, bias = load_mixture(gate_ptr, scale_ptr, bias_ptr, image, N, BLOCK_N)
    b_sum = tl.zeros((BLOCK_C,), tl.float32)
    b_known = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(0, C, BLOCK_C):
        b_psi, b_label = load_image(
            psi_ptr, label_ptr, image, start, N, C, stride_b, stride_n, stride_c,
            label_stride_b, label_stride_c, BLOCK_N, BLOCK_C,
        )  # fmt: skip
        b_x = scale * tl.sum(b_gate[:, None] * b_psi, 0) + bias
        b_loss, _ = label_losses(b_x, b_label, gamma_pos, gamma_neg, clip, CLIPPED)
        b_sum += b_loss
        b_known = tl.maximum(b_known, tl.where(b_label >= 0, 1.0, 0.0))
    tl.store(loss_ptr + image, tl.sum(b_sum, 0))
    tl.store(known_ptr + image, tl.max(b_known, 0))


@triton.jit
def mean_kernel(
    loss_ptr,  # [B]
    known_ptr,  # [B]
    mean_ptr,  # []
    inverse_count_ptr,  # []
    B,
    BLOCK: tl.constexpr,
):
    """Mean over the images with a known label, in a fixed order; one program."""
    b_sum = tl.zeros((BLOCK,), tl.float32)
    b_count = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, B, BLOCK):
        images = start + tl.arange(0, BLOCK)
        b_sum += tl.load(loss_ptr + images, mask=images < B, other=0.0)
        b_count += tl.load(known_ptr + images, mask=images < B, other=0.0)
    inverse_count = 1.0 / tl.maximum(tl.sum(b_count, 0), 1.0)
    tl.store(mean_ptr, tl.sum(b_sum, 0) * inverse_count)
    tl.store(inverse_count_ptr, inverse_count)


@triton.jit
def loss_gradient_kernel(
    psi_ptr,  # to label_ptr as in loss_kernel
    gate_ptr,
    scale_ptr,
    bias_ptr,
    label_ptr,
    upstream_ptr,  # []
    inverse_count_ptr,  # []
    dpsi_ptr,  # [B, N, C]
    dgate_ptr,  # [B, N]
    dscalars_ptr,  # [B, 2]: shares of scale and bias
    N,
    C,
    stride_b,
    stride_n,
    stride_c,
    label_stride_b,
    label_stride_c,
    gamma_pos,
    gamma_neg,
    clip,
    CLIPPED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """All gradients of one image."""
    image = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BLOCK_N)
    b_gate, scale, bias = load_mixture(gate_ptr, scale_ptr, bias_ptr, image, N, BLOCK_N)
    upstream = tl.load(upstream_ptr) * tl.load(inverse_count_ptr)
    b_dgate = tl.zeros((BLOCK_N,), tl.float32)
    b_dscale = tl.zeros((BLOCK_C,), tl.float32)
    b_dbias = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(0, C, BLOCK_C):
        b_psi, b_label = load_image(
            psi_ptr, label_ptr, image, start, N, C, stride_b, stride_n, stride_c,
            label_stride_b, label_stride_c, BLOCK_N, BLOCK_C,
        )  # fmt: skip
        b_mixed = tl.sum(b_gate[:, None] * b_psi, 0)
        _, b_dx = label_losses(scale * b_mixed + bias, b_label, gamma_pos, gamma_neg, clip, CLIPPED)
        b_dx *= upstream
        labels = start + tl.arange(0, BLOCK_C)
        tl.store(
            dpsi_ptr + (image * N + n[:, None]) * C + labels[None, :],
            scale * b_gate[:, None] * b_dx[None, :],
            mask=(n < N)[:, None] & (labels < C)[None, :],
        )
        b_dgate += tl.sum(b_psi * b_dx[None, :], 1)
        b_dscale += b_mixed * b_dx
        b_dbias += b_dx
    tl.store(dgate_ptr + image * N + n, scale * b_dgate, mask=n < N)
    tl.store(dscalars_ptr + image * 2, tl.sum(b_dscale, 0))
    tl.store(dscalars_ptr + image * 2 + 1, tl.sum(b_dbias, 0))


def supports(*tensors: Tensor) -> bool:
    """Whether the kernels take these scores (ψ first, [B, N, C], or logits [B, C]); float64 is the reference's."""
    conditions = tensors[0].shape[1] if tensors[0].dim() == 3 else 1
    return (
        all(tensor.dtype in DTYPES for tensor in tensors)
        and conditions <= CONDITION_BLOCKS[-1]
        and 0 not in tensors[0].shape
    )


def asymmetric_loss(
    logits: Tensor, labels: Tensor, *, gamma_pos: float, gamma_neg: float, clip: float
) -> Tensor:
    """``reference.asymmetric_loss`` by Triton kernels: one condition, with gate 1, scale 1 and bias 0."""
    one = logits.new_ones(1, 1, dtype=torch.float32)
    gate, scale, bias = one.expand(logits.shape[0], 1), one[0, 0], one[0, 0] - 1
    return gated_asymmetric_loss(
        logits[:, None], gate, scale, bias, labels, gamma_pos=gamma_pos, gamma_neg=gamma_neg, clip=clip
    )


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
    """``reference.gated_asymmetric_loss`` by Triton kernels, in float32."""
    signs = labels if labels.dtype == torch.int8 else labels.sign().to(torch.int8)
    arguments = psi, gate, scale, bias, signs, gamma_pos, gamma_neg, clip
    results: tuple[Tensor, Tensor] = _forward(*arguments)
    return results[0]


@torch.library.custom_op("fedmpt::gated_asymmetric_loss", mutates_args=())
def _forward(
    psi: Tensor,
    gate: Tensor,
    scale: Tensor,
    bias: Tensor,
    labels: Tensor,
    gamma_pos: float,
    gamma_neg: float,
    clip: float,
) -> tuple[Tensor, Tensor]:
    """The loss, and one over the number of images with a known label."""
    b, n, c = psi.shape
    losses, known = (torch.empty(b, dtype=torch.float32, device=psi.device) for _ in range(2))
    loss, inverse_count = _forward_outputs(psi)
    with torch.cuda.device_of(psi):
        loss_kernel[(b,)](
            psi, gate.contiguous(), scale, bias, labels, losses, known, n, c, *psi.stride(), *labels.stride(),
            gamma_pos, gamma_neg, clip, **_constants(n, clip),
        )  # fmt: skip
        mean_kernel[(1,)](losses, known, loss, inverse_count, b, BLOCK=REDUCE_BLOCK, enable_fp_fusion=True)
    return loss, inverse_count


def _forward_outputs(psi: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return psi.new_empty((), dtype=torch.float32), psi.new_empty((), dtype=torch.float32)


_forward.register_fake(_forward_outputs)


@torch.library.custom_op("fedmpt::gated_asymmetric_loss_backward", mutates_args=())
def _backward(
    upstream: Tensor,
    inverse_count: Tensor,
    psi: Tensor,
    gate: Tensor,
    scale: Tensor,
    bias: Tensor,
    labels: Tensor,
    gamma_pos: float,
    gamma_neg: float,
    clip: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ψ, of the gate, and of [scale, bias]."""
    b, n, c = psi.shape
    dpsi, dgate, dscalars = (
        torch.empty(shape, dtype=torch.float32, device=psi.device) for shape in ((b, n, c), (b, n), (b, 2))
    )
    with torch.cuda.device_of(psi):
        loss_gradient_kernel[(b,)](
            psi, gate.contiguous(), scale, bias, labels, upstream, inverse_count, dpsi, dgate, dscalars,
            n, c, *psi.stride(), *labels.stride(), gamma_pos, gamma_neg, clip, **_constants(n, clip),
        )  # fmt: skip
    return dpsi.to(psi.dtype), dgate.to(gate.dtype), dscalars.sum(0)


def _backward_outputs(
    upstream: Tensor, inverse_count: Tensor, psi: Tensor, gate: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return psi.new_empty(psi.shape), gate.new_empty(gate.shape), psi.new_empty(2, dtype=torch.float32)


_backward.register_fake(_backward_outputs)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1], *inputs[:5])
    ctx.options = inputs[5:]


def _gradients(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    dpsi, dgate, dscalars = _backward(upstream, *ctx.saved_tensors, *ctx.options)
    dscale, dbias = (dscalars[i].to(ctx.saved_tensors[3 + i].dtype) for i in range(2))
    return dpsi, dgate, dscale, dbias, None, None, None, None


_forward.register_autograd(_gradients, setup_context=_setup_context)


def blocks(conditions: int) -> dict[str, int]:
    """The block of conditions and labels that a program works on at a time."""
    block = next(block for block in CONDITION_BLOCKS if conditions <= block)
    return {"BLOCK_N": block, "BLOCK_C": min(MAXIMUM_LABELS, MAXIMUM_ELEMENTS // block)}


def _constants(conditions: int, clip: float) -> dict[str, Any]:
    return {
        "CLIPPED": clip > 0,
        **blocks(conditions),
        "num_warps": WARPS,
        "enable_fp_fusion": True,
    }
