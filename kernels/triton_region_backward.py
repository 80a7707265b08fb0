"""Triton kernels that make similarities and W again from the kept statistics: the plan, and both gradients.

With s = z·t + h·k, both gradients are products with ds = W·∂ψ (over the adapted norm): of dsᵀ with z or h, and of
ds with t or k. Each kernel is given the one to multiply with, ``y``. Notation as in ``triton_region_blocks``; a
leading ``d`` marks a gradient. ∂ψ is divided by its peak before it meets float16, whose smallest number it
would often fall below, and multiplied back in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fedmpt.kernels.triton_region_blocks import (
    NEGATIVE_INFINITY,
    TRANSPORT,
    features_of_pair,
    load_inverse_norm,
    similarity_block,
    weights_block,
)


@triton.jit
def plane_block(
    z_ptr,  # [B, N, M, D] by its strides
    t_ptr,  # [N, C, D]
    h_ptr,  # [B, N, M, R]
    k_ptr,  # [N, C, R]
    inverse_norm_ptr,  # [B, N, M]
    row_lse_ptr,  # [B, N, M]
    f_ptr,  # [B, N, M]
    g_ptr,  # [B, N, C]
    image,
    condition,
    rows,
    labels,
    N,
    M,
    C,
    D,
    R,
    stride_b,
    stride_n,
    stride_m,
    scale,
    inverse_reg,
    POOLING: tl.constexpr,
    ADAPTED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """s, W [BLOCK_M, BLOCK_C] and the inverse norm [BLOCK_M] by which s becomes a cosine."""
    in_m, in_c = rows < M, labels < C
    pair = image * N + condition
    z_ptr, t_ptr, h_ptr, k_ptr = features_of_pair(
        z_ptr, t_ptr, h_ptr, k_ptr, image, condition, N, M, C, D, R, stride_b, stride_n
    )
    b_s = similarity_block(
        z_ptr, t_ptr, h_ptr, k_ptr, rows, labels, M, C, D, R, stride_m,
        ADAPTED, BLOCK_M, BLOCK_C, BLOCK_D,
    )  # fmt: skip
    b_inverse_norm = load_inverse_norm(inverse_norm_ptr + pair * M, rows, in_m, ADAPTED, BLOCK_M)
    b_g = tl.load(g_ptr + pair * C + labels, mask=in_c, other=NEGATIVE_INFINITY)
    b_f, b_row_lse = b_inverse_norm, b_inverse_norm
    if POOLING == TRANSPORT:
        b_f = tl.load(f_ptr + pair * M + rows, mask=in_m, other=NEGATIVE_INFINITY)
        b_row_lse = tl.load(row_lse_ptr + pair * M + rows, mask=in_m, other=0.0)
    b_x = b_s * (b_inverse_norm * scale)[:, None]
    b_x = tl.where(in_m[:, None] & in_c[None, :], b_x, NEGATIVE_INFINITY)
    return b_s, weights_block(b_x, b_row_lse, b_f, b_g, rows, inverse_reg, POOLING), b_inverse_norm


@triton.jit
def plan_kernel(
    z_ptr,  # [B, N, M, D] by its strides
    t_ptr,  # [N, C, D]
    h_ptr,  # [B, N, M, R]
    k_ptr,  # [N, C, R]
    inverse_norm_ptr,  # [B, N, M]
    row_lse_ptr,  # [B, N, M]
    f_ptr,  # [B, N, M]
    g_ptr,  # [B, N, C]
    plan_ptr,  # [B, N, M, C]
    N,
    M,
    C,
    D,
    R,
    stride_b,
    stride_n,
    stride_m,
    scale,
    inverse_reg,
    POOLING: tl.constexpr,
    ADAPTED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A [BLOCK_M, BLOCK_C] block of P = W/C, for callers that ask for the plan."""
    pair = tl.program_id(0).to(tl.int64)
    image, condition = pair // N, pair % N
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    labels = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    _, b_w, _ = plane_block(
        z_ptr, t_ptr, h_ptr, k_ptr, inverse_norm_ptr, row_lse_ptr, f_ptr, g_ptr, image, condition, rows, labels,
        N, M, C, D, R, stride_b, stride_n, stride_m, scale, inverse_reg,
        POOLING, ADAPTED, BLOCK_M, BLOCK_C, BLOCK_D,
    )  # fmt: skip
    places = (pair * M + rows[:, None]) * C + labels[None, :]
    tl.store(plan_ptr + places, b_w / C, mask=(rows < M)[:, None] & (labels < C)[None, :])


@triton.jit
def label_gradient_kernel(
    z_ptr,  # [B, N, M, D] by its strides
    t_ptr,  # [N, C, D]
    h_ptr,  # [B, N, M, R]
    k_ptr,  # [N, C, R]
    inverse_norm_ptr,  # [B, N, M]
    row_lse_ptr,  # [B, N, M]
    f_ptr,  # [B, N, M]
    g_ptr,  # [B, N, C]
    dpsi_ptr,  # [B, N, C]
    y_ptr,  # z, or h: [B, N, M, Y] by its strides
    dt_ptr,  # [groups, N, C, Y]: dt, or dk: partial sums over the images of a group
    B,
    N,
    M,
    C,
    D,
    R,
    stride_b,
    stride_n,
    stride_m,
    Y,
    y_stride_b,
    y_stride_n,
    y_stride_m,
    scale,
    inverse_reg,
    images_per_group,
    POOLING: tl.constexpr,
    ADAPTED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,  # of the similarity's inner sum
    BLOCK_Y: tl.constexpr,  # of the output's width
):
    """A [BLOCK_C, BLOCK_Y] block of one condition's Σ dsᵀ y over the patches of a group of images."""
    label_blocks = tl.cdiv(C, BLOCK_C)
    condition = tl.program_id(0) // label_blocks
    labels = (tl.program_id(0) % label_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    columns = tl.program_id(1) * BLOCK_Y + tl.arange(0, BLOCK_Y)
    group = tl.program_id(2).to(tl.int64)
    in_c, in_y = labels < C, columns < Y
    first = group * images_per_group
    last = tl.minimum(first + images_per_group, B)

    b_peak = tl.full((BLOCK_C,), 1e-30, tl.float32)
    for image in range(first, last):
        b_dpsi = tl.load(dpsi_ptr + (image * N + condition) * C + labels, mask=in_c, other=0.0)
        b_peak = tl.maximum(b_peak, tl.abs(b_dpsi))

    b_dt = tl.zeros((BLOCK_C, BLOCK_Y), tl.float32)
    for image in range(first, last):
        pair = image * N + condition
        b_dpsi = tl.load(dpsi_ptr + pair * C + labels, mask=in_c, other=0.0) / b_peak
        for start in range(0, M, BLOCK_M):
            rows = start + tl.arange(0, BLOCK_M)
            _, b_w, b_inverse_norm = plane_block(
                z_ptr, t_ptr, h_ptr, k_ptr, inverse_norm_ptr, row_lse_ptr, f_ptr, g_ptr, image, condition, rows, labels,
                N, M, C, D, R, stride_b, stride_n, stride_m, scale, inverse_reg,
                POOLING, ADAPTED, BLOCK_M, BLOCK_C, BLOCK_D,
            )  # fmt: skip
            b_ds = b_w * b_dpsi[None, :] * b_inverse_norm[:, None]
            b_y = tl.load(
                y_ptr + image * y_stride_b + condition * y_stride_n
                + rows[:, None] * y_stride_m + columns[None, :],
                mask=(rows < M)[:, None] & in_y[None, :],
                other=0.0,
            )  # fmt: skip
            b_dt = tl.dot(tl.trans(b_ds.to(b_y.dtype)), b_y, b_dt, input_precision="tf32x3")

    places = ((group * N + condition) * C + labels[:, None]) * Y + columns[None, :]
    tl.store(dt_ptr + places, b_dt * b_peak[:, None], mask=in_c[:, None] & in_y[None, :])


@triton.jit
def patch_gradient_kernel(
    z_ptr,  # to dpsi_ptr as in label_gradient_kernel
    t_ptr,
    h_ptr,
    k_ptr,
    inverse_norm_ptr,
    row_lse_ptr,
    f_ptr,
    g_ptr,
    dpsi_ptr,
    y_ptr,  # t, or k: [N, C, Y]
    dz_ptr,  # [B, parts, M, Y]: dz, or dh
    dinverse_norm_ptr,  # [B, N, M]
    N,
    M,
    C,
    D,
    R,
    stride_b,
    stride_n,
    stride_m,
    Y,
    scale,
    inverse_reg,
    parts,  # conditions are summed over (1) or kept apart (N)
    POOLING: tl.constexpr,
    ADAPTED: tl.constexpr,
    WRITE_NORM: tl.constexpr,  # only with parts = N and one block of the width
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Y: tl.constexpr,
):
    """A [BLOCK_M, BLOCK_Y] block of one image's Σ ds y over the labels, and the gradient of the inverse norm."""
    image, part = tl.program_id(0).to(tl.int64) // parts, tl.program_id(0) % parts
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(2) * BLOCK_Y + tl.arange(0, BLOCK_Y)
    in_m, in_y = rows < M, columns < Y
    first = part * (N // parts)
    last = first + N // parts

    peak = tl.full((), 1e-30, tl.float32)
    for start in range(first * C, last * C, BLOCK_C):
        places = start + tl.arange(0, BLOCK_C)
        b_dpsi = tl.load(dpsi_ptr + image * N * C + places, mask=places < last * C, other=0.0)
        peak = tl.maximum(peak, tl.max(tl.abs(b_dpsi), 0))

    b_dz = tl.zeros((BLOCK_M, BLOCK_Y), tl.float32)
    b_dinverse_norm = tl.zeros((BLOCK_M,), tl.float32)
    for condition in range(first, last):
        pair = image * N + condition
        for start in range(0, C, BLOCK_C):
            labels = start + tl.arange(0, BLOCK_C)
            in_c = labels < C
            b_s, b_w, b_inverse_norm = plane_block(
                z_ptr, t_ptr, h_ptr, k_ptr, inverse_norm_ptr, row_lse_ptr, f_ptr, g_ptr, image, condition, rows, labels,
                N, M, C, D, R, stride_b, stride_n, stride_m, scale, inverse_reg,
                POOLING, ADAPTED, BLOCK_M, BLOCK_C, BLOCK_D,
            )  # fmt: skip
            b_dpsi = tl.load(dpsi_ptr + pair * C + labels, mask=in_c, other=0.0) / peak
            b_ds = b_w * b_dpsi[None, :]
            if WRITE_NORM:
                b_dinverse_norm += tl.sum(b_ds * b_s, 1)
            b_ds *= b_inverse_norm[:, None]
            b_y = tl.load(
                y_ptr + (condition * C + labels[:, None]) * Y + columns[None, :],
                mask=in_c[:, None] & in_y[None, :],
                other=0.0,
            )
            b_dz = tl.dot(b_ds.to(b_y.dtype), b_y, b_dz, input_precision="tf32x3")

    places = (tl.program_id(0).to(tl.int64) * M + rows[:, None]) * Y + columns[None, :]
    tl.store(dz_ptr + places, b_dz * peak, mask=in_m[:, None] & in_y[None, :])
    if WRITE_NORM:
        tl.store(dinverse_norm_ptr + (image * N + part) * M + rows, b_dinverse_norm * peak, mask=in_m)
