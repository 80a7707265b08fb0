"""Region transport on Triton: launches of the kernels beside this file, and their gradients.

The forward pass keeps two numbers a patch and one a label; the backward pass makes everything else again.
Importing this imports Triton. ``reference.region_transport`` is the definition.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from fedmpt.kernels import reference
from fedmpt.kernels.triton_region_backward import label_gradient_kernel, patch_gradient_kernel, plan_kernel
from fedmpt.kernels.triton_region_forward import blocked_kernel, plane_kernel
from fedmpt.kernels.triton_region_tiles import (
    LABEL_GRADIENTS,
    MAXIMUM_PATCHES,
    MAXIMUM_RANK,
    PATCH_GRADIENTS,
    Tile,
    forward_tile,
    gradient_tile,
    rank_block,
)

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
POOLING_CODES = {"transport": 0, "softmax": 1, "max": 2}

LABEL_GRADIENT_PROGRAMS = 264
"""Images are split into groups until so many programs run, two for each multiprocessor of an H100."""


def supports(tokens: Tensor, text: Tensor, adapters: tuple[Tensor, Tensor] | None) -> bool:
    """Whether the kernels take these sizes and dtypes; what they do not take is the reference's."""
    return (
        tokens.dtype in DTYPES
        and all(t.dtype in DTYPES for t in (text, *(adapters or ())))
        and 0 not in tokens.shape
        and tokens.shape[-2] <= MAXIMUM_PATCHES[tokens.element_size()]
        and (adapters is None or 0 < adapters[0].shape[1] <= MAXIMUM_RANK)
    )


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
    """``reference.region_transport`` by Triton kernels; products in the tokens' dtype, sums in float32."""
    text = text.float()
    hidden = folded = inverse_norm = None
    if adapters is not None:
        down, up = (adapter.float() for adapter in adapters)
        hidden, folded, inverse_norm = reference.adapter_terms(tokens, text, down, up, mixed_similarity)
    features = tokens, text, hidden, folded, inverse_norm
    results: tuple[Tensor, ...] = _forward(*features, logit_scale / tau, reg, iterations, pooling)
    if not return_plan:
        return results[0]
    with torch.no_grad():
        return results[0], _plan(*features, *results[1:], logit_scale / tau, reg, pooling)


@torch.library.custom_op("fedmpt::region_transport", mutates_args=())
def _forward(
    tokens: Tensor,
    text: Tensor,
    hidden: Tensor | None,
    folded: Tensor | None,
    inverse_norm: Tensor | None,
    scale: float,
    reg: float,
    iterations: int,
    pooling: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ψ and the statistics row logsumexp, f (both empty but for transport) and g."""
    outputs = _forward_outputs(tokens, text, pooling)
    inputs, sizes = _inputs(tokens, text, hidden, folded, inverse_norm)
    iterates = "none"
    if pooling == "transport":
        iterates = "scalings" if reg >= reference.SCALING_REG else "logarithms"
    tile, on_chip = forward_tile(tokens.shape[-2], text.shape[1], tokens.element_size(), iterates)
    constants = _constants(tile, pooling, hidden)
    if on_chip:
        constants |= plane_constants(tile, iterates)
    kernel = plane_kernel if on_chip else blocked_kernel
    with torch.cuda.device_of(tokens):  # type: ignore[no-untyped-call]
        kernel[(len(tokens) * len(text),)](*inputs, *outputs, *sizes, scale, 1 / reg, iterations, **constants)
    return outputs


def _forward_outputs(tokens: Tensor, text: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Empty outputs of ``_forward``, whose last argument is the pooling."""
    b, m, n, c = tokens.shape[0], tokens.shape[-2], text.shape[0], text.shape[1]
    rows = (b, n, m) if options[-1] == "transport" else (0,)
    shapes = ((b, n, c), rows, rows, (b, n, c))
    psi, row_lse, f, g = (torch.empty(shape, dtype=torch.float32, device=tokens.device) for shape in shapes)
    return psi, row_lse, f, g


_forward.register_fake(_forward_outputs)


@torch.library.custom_op("fedmpt::region_transport_plan", mutates_args=())
def _plan(
    tokens: Tensor,
    text: Tensor,
    hidden: Tensor | None,
    folded: Tensor | None,
    inverse_norm: Tensor | None,
    row_lse: Tensor,
    f: Tensor,
    g: Tensor,
    scale: float,
    reg: float,
    pooling: str,
) -> Tensor:
    """The plan [B, N, M, C], from the statistics of the forward pass."""
    plan = _plan_output(tokens, text)
    inputs, sizes = _inputs(tokens, text, hidden, folded, inverse_norm)
    (b, n, m, c), tile = plan.shape, gradient_tile(LABEL_GRADIENTS, text.shape[1], tokens.element_size())
    grid = b * n, triton.cdiv(m, tile.m), triton.cdiv(c, tile.c)
    constants = _constants(tile, pooling, hidden)
    with torch.cuda.device_of(tokens):  # type: ignore[no-untyped-call]
        plan_kernel[grid](*inputs, row_lse, f, g, plan, *sizes, scale, 1 / reg, **constants)
    # Similarities made again differ in the last bit, and 1/λ magnifies that: columns are set right again.
    return plan / (c * plan.sum(2, keepdim=True))


def _plan_output(tokens: Tensor, text: Tensor, *_: Any) -> Tensor:
    shape = tokens.shape[0], text.shape[0], tokens.shape[-2], text.shape[1]
    return torch.empty(shape, dtype=torch.float32, device=tokens.device)


_plan.register_fake(_plan_output)


@torch.library.custom_op("fedmpt::region_transport_backward", mutates_args=())
def _backward(
    dpsi: Tensor,
    tokens: Tensor,
    text: Tensor,
    hidden: Tensor | None,
    folded: Tensor | None,
    inverse_norm: Tensor | None,
    row_lse: Tensor,
    f: Tensor,
    g: Tensor,
    scale: float,
    reg: float,
    pooling: str,
    needs_tokens: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of tokens (empty unless needed), text, hidden, folded and inverse norm (empty without adapters)."""
    inputs, sizes = _inputs(tokens, text, hidden, folded, inverse_norm)
    inputs += row_lse, f, g, dpsi.contiguous()
    z, t, h, k = inputs[:4]
    b, (n, m, c, d, rank) = len(tokens), sizes[:5]
    by_label, by_patch = (
        gradient_tile(tiles, c, tokens.element_size()) for tiles in (LABEL_GRADIENTS, PATCH_GRADIENTS)
    )

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=tokens.device)

    def label_gradient(y: Tensor, width: int, block: int) -> Tensor:
        blocks, width_blocks = n * triton.cdiv(c, by_label.c), triton.cdiv(width, block)
        # Each group costs a partial sum: more than four must stay below a sixteenth of what the reference holds, which
        # is the tokens in float32 and about six planes.
        affordable = max(4, b * m * (d + 6 * n * c) // (16 * n * c * width))
        wanted = max(1, LABEL_GRADIENT_PROGRAMS // (blocks * width_blocks))
        per_group = triton.cdiv(b, min(wanted, affordable))
        partial = empty(triton.cdiv(b, per_group), n, c, width)
        label_gradient_kernel[(blocks, width_blocks, len(partial))](
            *inputs, y, partial, b, *sizes, width, *_token_strides(y), scale, 1 / reg, per_group,
            BLOCK_Y=block, **_constants(by_label, pooling, hidden),
        )  # fmt: skip
        return partial.sum(0)

    def patch_gradient(y: Tensor, width: int, block: int, parts: int, norm: Tensor | None) -> Tensor:
        gradient = empty(b, parts, m, width)
        patch_gradient_kernel[(b * parts, triton.cdiv(m, by_patch.m), triton.cdiv(width, block))](
            *inputs, y, gradient, gradient if norm is None else norm, *sizes, width, scale, 1 / reg, parts,
            WRITE_NORM=norm is not None, BLOCK_Y=block, **_constants(by_patch, pooling, hidden),
        )  # fmt: skip
        return gradient

    dtext = label_gradient(z, d, by_label.y)
    dtokens, dhidden, dfolded, dinverse_norm = empty(0), empty(0), empty(0), empty(0)
    if needs_tokens:
        dtokens = patch_gradient(t, d, by_patch.y, n if tokens.dim() == 4 else 1, None)
        dtokens = dtokens.reshape(tokens.shape).to(tokens.dtype)
    if rank:
        dinverse_norm = empty(b, n, m)
        dhidden = patch_gradient(k, rank, rank_block(rank), n, dinverse_norm)
        dfolded = label_gradient(h, rank, rank_block(rank))
    return dtokens, dtext, dhidden, dfolded, dinverse_norm


def _backward_outputs(
    dpsi: Tensor,
    tokens: Tensor,
    text: Tensor,
    hidden: Tensor | None,
    folded: Tensor | None,
    inverse_norm: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    def like(tensor: Tensor | None) -> Tensor:
        return text.new_empty(0 if tensor is None else tensor.shape)

    dtokens = tokens.new_empty(tokens.shape) if options[-1] else text.new_empty(0)
    return dtokens, like(text), like(hidden), like(folded), like(inverse_norm)


_backward.register_fake(_backward_outputs)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tokens, text, hidden, folded, inverse_norm, scale, reg, _, pooling = inputs
    ctx.save_for_backward(tokens, text, hidden, folded, inverse_norm, *output[1:])
    ctx.options = scale, reg, pooling


def _gradients(ctx: Any, dpsi: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    adapted = ctx.saved_tensors[2] is not None
    dtokens, dtext, dhidden, dfolded, dinverse_norm = _backward(
        dpsi, *ctx.saved_tensors, *ctx.options, ctx.needs_input_grad[0]
    )
    return (
        dtokens if ctx.needs_input_grad[0] else None,
        dtext,
        *((dhidden, dfolded, dinverse_norm) if adapted else (None, None, None)),
        *[None] * 4,
    )


_forward.register_autograd(_gradients, setup_context=_setup_context)


class _MixedSimilarity(torch.autograd.Function):
    """``reference.similarity`` of half-precision tokens with float32 features, multiplied in half precision.

    The gradient is scaled by its peak before it is rounded: float16 would lose most of it otherwise.
    """

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, features: Tensor) -> Tensor:
        features = features.to(tokens.dtype)
        ctx.save_for_backward(tokens, features)
        return reference.similarity(tokens, features).float()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor]:
        tokens, features = ctx.saved_tensors
        peak = gradient.abs().amax().clamp_min(1e-30)
        scaled = (gradient / peak).to(tokens.dtype)
        token_axes = "bmd" if tokens.dim() == 3 else "bnmd"
        dfeatures = torch.einsum(f"bnmr,{token_axes}->nrd", scaled, tokens).float() * peak
        if not ctx.needs_input_grad[0]:
            return None, dfeatures
        dtokens = torch.einsum(f"bnmr,nrd->{token_axes}", scaled, features).float() * peak
        return dtokens.to(tokens.dtype), dfeatures


def mixed_similarity(tokens: Tensor, features: Tensor) -> Tensor:
    """Inner products [B, N, M, r] in float32 of tokens of any dtype with float32 features [N, r, D]."""
    if tokens.dtype == torch.float32:
        return reference.similarity(tokens, features)
    product: Tensor = _MixedSimilarity.apply(tokens, features)  # type: ignore[no-untyped-call]
    return product


def _inputs(
    tokens: Tensor, text: Tensor, hidden: Tensor | None, folded: Tensor | None, inverse_norm: Tensor | None
) -> tuple[list[Tensor], tuple[int, ...]]:
    """What every kernel starts with: z, t, h, k (t, h and k in z's dtype), inverse norm; and N, M, C, D, R, strides.

    z may have any strides but the last, t, h and k none of their own. Where there are no adapters, the pointers to
    what is absent are never read.
    """
    z = tokens if tokens.stride(-1) == 1 else tokens.contiguous()
    t = text.to(tokens.dtype).contiguous()
    n, c, d = text.shape
    sizes = n, tokens.shape[-2], c, d, 0 if hidden is None else hidden.shape[3], *_token_strides(z)
    if hidden is None or folded is None or inverse_norm is None:
        return [z, t, t, t, text], sizes
    h, k = (tensor.to(tokens.dtype).contiguous() for tensor in (hidden, folded))
    return [z, t, h, k, inverse_norm.contiguous()], sizes


def _constants(tile: Tile, pooling: str, hidden: Tensor | None) -> dict[str, Any]:
    """What every kernel is compiled for."""
    return {
        "POOLING": POOLING_CODES[pooling],
        "ADAPTED": hidden is not None,
        "BLOCK_M": tile.m,
        "BLOCK_C": tile.c,
        "BLOCK_D": tile.d,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        "maxnreg": tile.registers,
        "enable_fp_fusion": True,  # a multiply-add rounds once; Triton's own default changes between versions
    }


def plane_constants(tile: Tile, iterates: str) -> dict[str, Any]:
    """What ``plane_kernel`` is compiled for besides."""
    return {"SCALING": iterates == "scalings", "POOL_C": tile.pool[0], "POOL_D": tile.pool[1]}


def _token_strides(tokens: Tensor) -> tuple[int, ...]:
    """Strides over B, N and M; conditions that share their tokens are 0 apart."""
    return tokens.stride()[:3] if tokens.dim() == 4 else (tokens.stride(0), 0, tokens.stride(1))
