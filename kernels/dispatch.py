"""The public operations: each checks its inputs, then runs the Triton kernels on CUDA, the reference elsewhere."""

from __future__ import annotations

import math
from importlib.util import find_spec

from torch import Tensor

from fedmpt.kernels import reference

HAS_TRITON = find_spec("triton") is not None  # it is not there for every platform that has CUDA


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
    """ψ [B, N, C] (and the plan [B, N, M, C]); see ``reference.region_transport``, which defines it.

    Raises:
        ValueError: a shape, dtype, device or option that does not fit; the text names it.
    """
    _check_features(tokens, text, adapters)
    if pooling not in reference.POOLINGS:
        raise ValueError(f"pooling is {pooling!r}; use one of {', '.join(reference.POOLINGS)}")
    for name, value in (("tau", tau), ("reg", reg), ("logit_scale", logit_scale)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name} is {value}; it must be above 0 and finite")
    if iterations < 1:
        raise ValueError(f"iterations is {iterations}; at least 1 is needed")
    implementation = reference.region_transport
    if _takes_triton(tokens):
        from fedmpt.kernels import triton_region_transport

        if triton_region_transport.supports(tokens, text, adapters):
            implementation = triton_region_transport.region_transport
    return implementation(
        tokens,
        text,
        logit_scale=logit_scale,
        tau=tau,
        reg=reg,
        iterations=iterations,
        pooling=pooling,
        adapters=adapters,
        return_plan=return_plan,
    )


def asymmetric_loss(
    logits: Tensor, labels: Tensor, *, gamma_pos: float, gamma_neg: float, clip: float
) -> Tensor:
    """Scalar loss of logits [B, C] against labels [B, C] in {1, 0, −1}; see ``reference.asymmetric_loss``.

    Raises:
        ValueError: a shape, dtype, device or option that does not fit; the text names it.
    """
    _check("logits", logits, ("B", "C"), {}, floating=True)
    _check_loss(labels, {"B": logits.shape[0], "C": logits.shape[1]}, logits, gamma_pos, gamma_neg, clip)
    implementation = reference.asymmetric_loss
    if _takes_triton(logits):
        from fedmpt.kernels import triton_asymmetric_loss

        if triton_asymmetric_loss.supports(logits):
            implementation = triton_asymmetric_loss.asymmetric_loss
    return implementation(logits, labels, gamma_pos=gamma_pos, gamma_neg=gamma_neg, clip=clip)


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
    """Scalar loss of scale · Σ_n gate[b,n] ψ[b,n,c] + bias; see ``reference.gated_asymmetric_loss``.

    Raises:
        ValueError: a shape, dtype, device or option that does not fit; the text names it.
    """
    sizes: dict[str, int] = {}
    _check("psi", psi, ("B", "N", "C"), sizes, floating=True)
    _check("gate", gate, ("B", "N"), sizes, floating=True)
    _check("scale", scale, (), sizes, floating=True)
    _check("bias", bias, (), sizes, floating=True)
    _same_device(psi, gate=gate, scale=scale, bias=bias)
    _check_loss(labels, sizes, psi, gamma_pos, gamma_neg, clip)
    implementation = reference.gated_asymmetric_loss
    if _takes_triton(psi):
        from fedmpt.kernels import triton_asymmetric_loss

        if triton_asymmetric_loss.supports(psi, gate, scale, bias):
            implementation = triton_asymmetric_loss.gated_asymmetric_loss
    return implementation(psi, gate, scale, bias, labels, gamma_pos=gamma_pos, gamma_neg=gamma_neg, clip=clip)


def _takes_triton(tensor: Tensor) -> bool:
    return tensor.is_cuda and HAS_TRITON


def _check_features(tokens: Tensor, text: Tensor, adapters: tuple[Tensor, Tensor] | None) -> None:
    sizes: dict[str, int] = {}
    _check("text", text, ("N", "C", "D"), sizes, floating=True)
    _check(
        "tokens", tokens, ("B", "N", "M", "D") if tokens.dim() == 4 else ("B", "M", "D"), sizes, floating=True
    )
    _same_device(tokens, text=text)
    if tokens.shape[-2] == 0 or 0 in text.shape:
        raise ValueError(
            f"tokens {tuple(tokens.shape)} and text {tuple(text.shape)}: "
            "at least one patch, condition and label is needed"
        )
    if adapters is not None:
        down, up = adapters
        _check("adapters[0]", down, ("N", "r", "D"), sizes, floating=True)
        _check("adapters[1]", up, ("N", "D", "r"), sizes, floating=True)
        _same_device(tokens, **{"adapters[0]": down, "adapters[1]": up})


def _check_loss(
    labels: Tensor, sizes: dict[str, int], scores: Tensor, gamma_pos: float, gamma_neg: float, clip: float
) -> None:
    _check("labels", labels, ("B", "C"), sizes, floating=False)
    _same_device(scores, labels=labels)
    for name, value in (("gamma_pos", gamma_pos), ("gamma_neg", gamma_neg)):
        if not value >= 0:
            raise ValueError(f"{name} is {value}; it must be at least 0")
    if not 0 <= clip < 1:
        raise ValueError(f"clip is {clip}; it must be at least 0 and below 1")


def _check(
    name: str, tensor: Tensor, axes: tuple[str, ...], sizes: dict[str, int], *, floating: bool
) -> None:
    """Hold a tensor to named axes; sizes seen first are kept in ``sizes`` and bind the tensors after it."""
    expected = "[" + ", ".join(f"{axis}={sizes[axis]}" if axis in sizes else axis for axis in axes) + "]"
    shape = list(tensor.shape)
    if len(shape) != len(axes) or any(
        sizes.setdefault(axis, size) != size for axis, size in zip(axes, shape, strict=True)
    ):
        raise ValueError(f"{name} has shape {shape}; expected {expected}")
    if floating and not tensor.is_floating_point():
        raise ValueError(f"{name} is {tensor.dtype}; a floating-point tensor is needed")
    if tensor.is_complex():
        raise ValueError(f"{name} is {tensor.dtype}; a real tensor is needed")


def _same_device(reference_tensor: Tensor, **others: Tensor) -> None:
    for name, tensor in others.items():
        if tensor.device != reference_tensor.device:
            raise ValueError(
                f"{name} is on {tensor.device}, but the tensors before it are on {reference_tensor.device}"
            )
