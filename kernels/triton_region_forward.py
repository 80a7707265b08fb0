"""Triton kernels from features to ψ: one program per image and condition, its [M, C] plane on chip.

Notation: ``b_`` is a block in registers, x = ℓ/τ the scaled similarity, p = softmax_c(x), affinity = (p − ½)/λ
the centred −K/λ, W = C·P the weights whose columns sum to 1. f = log u and g = log v are the transport's
duals: W = exp(affinity + f + g).
"""

from __future__ import annotations

import triton
import triton.language as tl

TRANSPORT = tl.constexpr(0)
SOFTMAX = tl.constexpr(1)
MAX = tl.constexpr(2)

NEGATIVE_INFINITY = tl.constexpr(float("-inf"))
POOL_BLOCK = tl.constexpr(32)  # labels at a time where a plane is multiplied again


@triton.jit
def add_products(
    b_s,
    z_ptr,  # [M, D] by its strides
    t_ptr,  # [C, D]
    rows,
    labels,
    M,
    C,
    D,
    stride_m,
    stride_d,
    BLOCK_D: tl.constexpr,
):
    """s + z·t for the given rows and labels; adds 0 outside M and C."""
    in_m, in_c = rows < M, labels < C
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        in_d = d < D
        b_z = tl.load(
            z_ptr + rows[:, None] * stride_m + d[None, :] * stride_d,
            mask=in_m[:, None] & in_d[None, :],
            other=0.0,
        )
        b_t = tl.load(t_ptr + labels[None, :] * D + d[:, None], mask=in_c[None, :] & in_d[:, None], other=0.0)
        b_s = tl.dot(b_z, b_t, b_s, input_precision="tf32x3")
    return b_s


@triton.jit
def similarity_block(
    z_ptr,  # [M, D] of one image (and condition)
    t_ptr,  # [C, D] of one condition
    h_ptr,  # [M, R]
    k_ptr,  # [C, R]
    rows,
    labels,
    M,
    C,
    D,
    R,
    stride_m,
    stride_d,
    ADAPTED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """z·t (+ h·k where adapted) for the given rows and labels, [BLOCK_M, BLOCK_C]; 0 outside M and C."""
    b_s = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    if ADAPTED:
        b_s = add_products(b_s, h_ptr, k_ptr, rows, labels, M, C, R, R, 1, BLOCK_D)
    return add_products(b_s, z_ptr, t_ptr, rows, labels, M, C, D, stride_m, stride_d, BLOCK_D)


@triton.jit
def log_row_marginal(b_row_max, in_m):
    """log softmax over the patches of each patch's best x; −inf outside M."""
    b_row_max = tl.where(in_m, b_row_max, NEGATIVE_INFINITY)
    highest = tl.max(b_row_max, 0)
    return b_row_max - highest - tl.log(tl.sum(tl.exp(b_row_max - highest), 0))


@triton.jit
def affinity_block(b_x, b_row_lse, in_c, inverse_reg):
    """−K/λ, centred, from x and its logsumexp over all labels; finite outside C."""
    b_p = tl.exp(tl.where(in_c[None, :], b_x, NEGATIVE_INFINITY) - b_row_lse[:, None])
    return (b_p - 0.5) * inverse_reg


@triton.jit
def column_dual(b_affinity, b_f, in_c):
    """g = −logsumexp_m(affinity + f), so that the columns of W sum to 1; −inf outside C."""
    b_y = b_affinity + b_f[:, None]
    highest = tl.max(b_y, 0)
    b_g = -highest - tl.log(tl.sum(tl.exp(b_y - highest[None, :]), 0))
    return tl.where(in_c, b_g, NEGATIVE_INFINITY)


@triton.jit
def weights_block(b_x, b_row_lse, b_f, b_g, rows, inverse_reg, POOLING: tl.constexpr):
    """W from the statistics that the forward pass keeps (for MAX, g holds the best patch's index).

    Outside M and C, x must be −inf: exp of anything else could overflow there.
    """
    if POOLING == TRANSPORT:
        b_affinity = (tl.exp(b_x - b_row_lse[:, None]) - 0.5) * inverse_reg
        b_w = tl.exp(b_affinity + b_f[:, None] + b_g[None, :])
    elif POOLING == SOFTMAX:
        b_w = tl.exp(b_x + b_g[None, :])
    else:
        b_w = tl.where(rows.to(tl.float32)[:, None] == b_g[None, :], 1.0, 0.0)
    return b_w


@triton.jit
def pool_columns(b_x, rows, in_m, POOLING: tl.constexpr):
    """Statistic g and weights W of the poolings that look at one label alone: SOFTMAX and MAX."""
    b_x = tl.where(in_m[:, None], b_x, NEGATIVE_INFINITY)
    if POOLING == SOFTMAX:
        highest = tl.max(b_x, 0)
        b_g = -highest - tl.log(tl.sum(tl.exp(b_x - highest[None, :]), 0))
    else:
        b_g = tl.argmax(b_x, 0).to(tl.float32)
    return b_g, weights_block(b_x, b_g, b_g, b_g, rows, 0.0, POOLING)


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
    stride_d,
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
            z_ptr, t_ptr, h_ptr, k_ptr, rows, labels, M, C, D, R, stride_m, stride_d,
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
    stride_d,
    scale,  # s/τ
    inverse_reg,  # 1/λ
    iterations,
    POOLING: tl.constexpr,
    SCALING: tl.constexpr,  # iterate u and v themselves, not their logarithms
    KEEP: tl.constexpr,  # keep the cosines on chip through the iterations, or multiply again after them
    ADAPTED: tl.constexpr,
    BLOCK_M: tl.constexpr,  # at least M
    BLOCK_C: tl.constexpr,  # at least C
    BLOCK_D: tl.constexpr,
):
    """The whole [M, C] plane of one (image, condition) in registers, Sinkhorn included."""
    pair = tl.program_id(0).to(tl.int64)
    image, condition = pair // N, pair % N
    z_ptr += image * stride_b + condition * stride_n
    t_ptr += condition * C * D
    h_ptr += pair * M * R
    k_ptr += condition * C * R
    rows, labels = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_C)
    in_m, in_c = rows < M, labels < C

    b_inverse_norm = tl.full((BLOCK_M,), 1.0, tl.float32)
    if ADAPTED:
        b_inverse_norm = tl.load(inverse_norm_ptr + pair * M + rows, mask=in_m, other=0.0)
    b_cosine = b_inverse_norm[:, None] * similarity_block(
        z_ptr, t_ptr, h_ptr, k_ptr, rows, labels, M, C, D, R, stride_m, stride_d,
        ADAPTED, BLOCK_M, BLOCK_C, BLOCK_D,
    )  # fmt: skip

    if POOLING == TRANSPORT:
        b_x = tl.where(in_c[None, :], b_cosine * scale, NEGATIVE_INFINITY)
        b_row_max = tl.max(b_x, 1)
        b_p = tl.exp(b_x - b_row_max[:, None])
        b_total = tl.sum(b_p, 1)
        b_row_lse = b_row_max + tl.log(b_total)
        b_affinity = (b_p * (1.0 / b_total)[:, None] - 0.5) * inverse_reg
        b_row = log_row_marginal(b_row_max, in_m)
        if SCALING:
            b_w = tl.exp(b_affinity)
            b_a = tl.exp(b_row)
            b_u = b_a
            b_v = tl.where(in_c, 1.0 / C, 0.0)
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

    if KEEP:
        tl.store(psi_ptr + pair * C + labels, tl.sum(b_w * b_cosine, 0), mask=in_c)
        tl.store(g_ptr + pair * C + labels, b_g, mask=in_c)
    else:
        pool_blocks(
            z_ptr, t_ptr, h_ptr, k_ptr, psi_ptr + pair * C, g_ptr + pair * C, b_inverse_norm, b_row_lse, b_f,
            rows, M, C, D, R, stride_m, stride_d, scale, inverse_reg,
            POOLING, ADAPTED, BLOCK_M, POOL_BLOCK, BLOCK_D,
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
    stride_d,
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
    image, condition = pair // N, pair % N
    z_ptr += image * stride_b + condition * stride_n
    t_ptr += condition * C * D
    h_ptr += pair * M * R
    k_ptr += condition * C * R
    rows = tl.arange(0, BLOCK_M)
    in_m = rows < M
    b_inverse_norm = tl.full((BLOCK_M,), 1.0, tl.float32)
    if ADAPTED:
        b_inverse_norm = tl.load(inverse_norm_ptr + pair * M + rows, mask=in_m, other=0.0)

    b_row_lse = tl.zeros((BLOCK_M,), tl.float32)
    b_f = tl.zeros((BLOCK_M,), tl.float32)
    if POOLING == TRANSPORT:
        b_max = tl.full((BLOCK_M,), NEGATIVE_INFINITY, tl.float32)
        b_sum = tl.zeros((BLOCK_M,), tl.float32)
        for start in range(0, C, BLOCK_C):
            labels = start + tl.arange(0, BLOCK_C)
            b_cosine = b_inverse_norm[:, None] * similarity_block(
                z_ptr, t_ptr, h_ptr, k_ptr, rows, labels, M, C, D, R, stride_m, stride_d,
                ADAPTED, BLOCK_M, BLOCK_C, BLOCK_D,
            )  # fmt: skip
            b_x = tl.where((labels < C)[None, :], b_cosine * scale, NEGATIVE_INFINITY)
            b_max, b_sum = fold_logsumexp(b_max, b_sum, b_x)
        b_row = log_row_marginal(b_max, in_m)
        b_row_lse = b_max + tl.log(b_sum)
        for sweep in range(iterations):
            b_max = tl.full((BLOCK_M,), NEGATIVE_INFINITY, tl.float32)
            b_sum = tl.zeros((BLOCK_M,), tl.float32)
            for start in range(0, C, BLOCK_C):
                labels = start + tl.arange(0, BLOCK_C)
                b_cosine = b_inverse_norm[:, None] * similarity_block(
                    z_ptr, t_ptr, h_ptr, k_ptr, rows, labels, M, C, D, R, stride_m, stride_d,
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
        rows, M, C, D, R, stride_m, stride_d, scale, inverse_reg,
        POOLING, ADAPTED, BLOCK_M, BLOCK_C, BLOCK_D,
    )  # fmt: skip


@triton.jit
def fold_logsumexp(b_max, b_sum, b_y):
    """Fold the columns of y into running row maxima and sums of exponentials."""
    b_next = tl.maximum(b_max, tl.max(b_y, 1))
    return b_next, b_sum * tl.exp(b_max - b_next) + tl.sum(tl.exp(b_y - b_next[:, None]), 1)
