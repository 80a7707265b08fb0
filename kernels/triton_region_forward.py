"""Triton kernels from features to ψ: one program per image and condition, its [M, C] plane on chip.

Notation as in ``triton_region_blocks``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fedmpt.kernels.triton_region_blocks import (
    NEGATIVE_INFINITY,
    TRANSPORT,
    affinity_block,
    column_dual,
    features_of_pair,
    fold_logsumexp,
    load_inverse_norm,
    log_row_marginal,
    pool_columns,
    similarity_block,
)


@triton.jit
def pool_blocks(
    z_ptr,  # to k_ptr as in similarity_block
    t_ptr,
    h_ptr,
    k_ptr,
    psi_ptr,  # [C]
    g_ptr,  # [C]
    b_inverse_norm,
    b_row_lse,
    b_f,
    rows,
    M,
    C,
    D,
    R,
    stride_m,
    scale,
    inverse_reg,
    POOLING: tl.constexpr,
    ADAPTED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """ψ and g of all labels, a block at a time; the last row dual f determines g and with it the weights."""
    for start in range(0, C, BLOCK_C):
        labels = start + tl.arange(0, BLOCK_C)
        in_c = labels < C
        b_cosine = b_inverse_norm[:, None] * similarity_block(
            z_ptr, t_ptr, h_ptr, k_ptr, rows, labels, M, C, D, R, stride_m,
            ADAPTED, BLOCK_M, BLOCK_C, BLOCK_D,
        )  # fmt: skip
        if POOLING == TRANSPORT:
            b_affinity = affinity_block(b_cosine * scale, b_row_lse, in_c, inverse_reg)
            b_g = column_dual(b_affinity, b_f, in_c)
            b_w = tl.exp(b_affinity + b_f[:, None] + b_g[None, :])
        else:
            b_g, b_w = pool_columns(b_cosine * scale, rows, rows < M, POOLING)
        tl.store(psi_ptr + labels, tl.sum(b_w * b_cosine, 0), mask=in_c)
        tl.store(g_ptr + labels, b_g, mask=in_c)


@triton.jit
def plane_kernel(
    z_ptr,  # [B, N, M, D] by its strides; stride_n = 0 where conditions share the tokens
    t_ptr,  # [N, C, D]
    h_ptr,  # [B, N, M, R]
    k_ptr,  # [N, C, R]
    inverse_norm_ptr,  # [B, N, M]
    psi_ptr,  # [B, N, C]
    row_lse_ptr,  # [B, N, M]
    f_ptr,  # [B, N, M]
    g_ptr,  # [B, N, C]
    N,
    M,
    C,
    D,
    R,
    stride_b,
    stride_n,
    stride_m,
    scale,  # s/τ
    inverse_reg,  # 1/λ
    iterations,
    POOLING: tl.constexpr,
    SCALING: tl.constexpr,  # iterate u and v themselves, not their logarithms
    ADAPTED: tl.constexpr,
    BLOCK_M: tl.constexpr,  # at least M
    BLOCK_C: tl.constexpr,  # at least C
    BLOCK_D: tl.constexpr,
    POOL_C: tl.constexpr,  # the block in which cosines are multiplied again at the end; 0: they stay on chip
    POOL_D: tl.constexpr,
):
    """The whole [M, C] plane of one (image, condition) in registers, Sinkhorn included."""
    pair = tl.program_id(0).to(tl.int64)
    z_ptr, t_ptr, h_ptr, k_ptr = features_of_pair(
        z_ptr, t_ptr, h_ptr, k_ptr, pair // N, pair % N, N, M, C, D, R, stride_b, stride_n
    )
    rows, labels = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_C)
    in_m, in_c = rows < M, labels < C

    b_inverse_norm = load_inverse_norm(inverse_norm_ptr + pair * M, rows, in_m, ADAPTED, BLOCK_M)
    b_cosine = b_inverse_norm[:, None] * similarity_block(
        z_ptr, t_ptr, h_ptr, k_ptr, rows, labels, M, C, D, R, stride_m,
        ADAPTED, BLOCK_M, BLOCK_C, BLOCK_D,
    )  # fmt: skip

    if POOLING == TRANSPORT:
        b_x = tl.where(in_c[None, :], b_cosine * scale, NEGATIVE_INFINITY)
        b_row_max = tl.max(b_x, 1)
        b_p = tl.exp(b_x - b_row_max[:, None])
        b_total = tl.sum(b_p, 1)
        b_row_lse = b_row_max + tl.log(b_total)
        b_affinity = (b_p * (1.0 / b_total)[:, None] - 0.5) * inverse_reg
        b_row = log_row_marginal(b_row_max, in_m, C)
        if SCALING:
            b_w = tl.exp(b_affinity)
            b_a = tl.exp(b_row)
            b_u = b_a
            b_v = tl.where(in_c, 1.0, 0.0)
            for _ in range(iterations):
                b_u = b_a / tl.sum(b_w * b_v[None, :], 1)
                b_v = tl.where(in_c, 1.0 / tl.sum(b_w * b_u[:, None], 0), 0.0)
            b_w *= b_u[:, None] * b_v[None, :]
            # A weight that underflowed stays 0 in the backward pass too.
            b_f = tl.where(b_u > 0.0, tl.log(tl.maximum(b_u, 1e-38)), NEGATIVE_INFINITY)
            b_g = tl.where(in_c, tl.log(tl.where(in_c, b_v, 1.0)), NEGATIVE_INFINITY)
        else:
            b_f = b_row
            b_g = tl.where(in_c, 0.0, NEGATIVE_INFINITY)
            for _ in range(iterations):
                b_y = b_affinity + b_g[None, :]
                highest = tl.max(b_y, 1)
                b_f = b_row - highest - tl.log(tl.sum(tl.exp(b_y - highest[:, None]), 1))
                b_g = column_dual(b_affinity, b_f, in_c)
            b_w = tl.exp(b_affinity + b_f[:, None] + b_g[None, :])
        tl.store(row_lse_ptr + pair * M + rows, b_row_lse, mask=in_m)
        tl.store(f_ptr + pair * M + rows, b_f, mask=in_m)
    else:
        b_row_lse = b_inverse_norm
        b_f = b_inverse_norm
        b_g, b_w = pool_columns(b_cosine * scale, rows, in_m, POOLING)

    if POOL_C == 0:
        tl.store(psi_ptr + pair * C + labels, tl.sum(b_w * b_cosine, 0), mask=in_c)
        tl.store(g_ptr + pair * C + labels, b_g, mask=in_c)
    else:
        pool_blocks(
            z_ptr, t_ptr, h_ptr, k_ptr, psi_ptr + pair * C, g_ptr + pair * C, b_inverse_norm, b_row_lse, b_f,
            rows, M, C, D, R, stride_m, scale, inverse_reg,
            POOLING, ADAPTED, BLOCK_M, POOL_C, POOL_D,
        )  # fmt: skip


@triton.jit
def blocked_kernel(
    z_ptr,  # the arguments are plane_kernel's
    t_ptr,
    h_ptr,
    k_ptr,
    inverse_norm_ptr,
    psi_ptr,
    row_lse_ptr,
    f_ptr,
    g_ptr,
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
    iterations,
    POOLING: tl.constexpr,
    ADAPTED: tl.constexpr,
    BLOCK_M: tl.constexpr,  # at least M
    BLOCK_C: tl.constexpr,  # any
    BLOCK_D: tl.constexpr,
):
    """Planes too large for the chip: blocks of labels, multiplied again in each of iterations + 2 sweeps.

    A sweep updates the column dual of each block and folds it into the next row dual at once, so that
    only the row dual lives from sweep to sweep.
    """
    pair = tl.program_id(0).to(tl.int64)
    z_ptr, t_ptr, h_ptr, k_ptr = features_of_pair(
        z_ptr, t_ptr, h_ptr, k_ptr, pair // N, pair % N, N, M, C, D, R, stride_b, stride_n
    )
    rows = tl.arange(0, BLOCK_M)
    in_m = rows < M
    b_inverse_norm = load_inverse_norm(inverse_norm_ptr + pair * M, rows, in_m, ADAPTED, BLOCK_M)

    b_row_lse = tl.zeros((BLOCK_M,), tl.float32)
    b_f = tl.zeros((BLOCK_M,), tl.float32)
    if POOLING == TRANSPORT:
        b_max = tl.full((BLOCK_M,), NEGATIVE_INFINITY, tl.float32)
        b_sum = tl.zeros((BLOCK_M,), tl.float32)
        for start in range(0, C, BLOCK_C):
            labels = start + tl.arange(0, BLOCK_C)
            b_cosine = b_inverse_norm[:, None] * similarity_block(
                z_ptr, t_ptr, h_ptr, k_ptr, rows, labels, M, C, D, R, stride_m,
                ADAPTED, BLOCK_M, BLOCK_C, BLOCK_D,
            )  # fmt: skip
            b_x = tl.where((labels < C)[None, :], b_cosine * scale, NEGATIVE_INFINITY)
            b_max, b_sum = fold_logsumexp(b_max, b_sum, b_x)
        b_row = log_row_marginal(b_max, in_m, C)
        b_row_lse = b_max + tl.log(b_sum)
        for sweep in range(iterations):
            b_max = tl.full((BLOCK_M,), NEGATIVE_INFINITY, tl.float32)
            b_sum = tl.zeros((BLOCK_M,), tl.float32)
            for start in range(0, C, BLOCK_C):
                labels = start + tl.arange(0, BLOCK_C)
                b_cosine = b_inverse_norm[:, None] * similarity_block(
                    z_ptr, t_ptr, h_ptr, k_ptr, rows, labels, M, C, D, R, stride_m,
                    ADAPTED, BLOCK_M, BLOCK_C, BLOCK_D,
                )  # fmt: skip
                b_affinity = affinity_block(b_cosine * scale, b_row_lse, labels < C, inverse_reg)
                b_g = tl.where(labels < C, 0.0, NEGATIVE_INFINITY)
                if sweep > 0:
                    b_g = column_dual(b_affinity, b_f, labels < C)
                b_max, b_sum = fold_logsumexp(b_max, b_sum, b_affinity + b_g[None, :])
            b_f = b_row - b_max - tl.log(b_sum)
        tl.store(row_lse_ptr + pair * M + rows, b_row_lse, mask=in_m)
        tl.store(f_ptr + pair * M + rows, b_f, mask=in_m)

    pool_blocks(
        z_ptr, t_ptr, h_ptr, k_ptr, psi_ptr + pair * C, g_ptr + pair * C, b_inverse_norm, b_row_lse, b_f,
        rows, M, C, D, R, stride_m, scale, inverse_reg,
        POOLING, ADAPTED, BLOCK_M, BLOCK_C, BLOCK_D,
    )  # fmt: skip
