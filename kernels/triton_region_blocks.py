"""What the region kernels share: blocks of similarities, and of the weights made from them.

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
    BLOCK_D: tl.constexpr,
):
    """s + z·t for the given rows and labels; adds 0 outside M and C."""
    in_m, in_c = rows < M, labels < C
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        in_d = d < D
        b_z = tl.load(
            z_ptr + rows[:, None] * stride_m + d[None, :],
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
    ADAPTED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """z·t (+ h·k where adapted) for the given rows and labels, [BLOCK_M, BLOCK_C]; 0 outside M and C."""
    b_s = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    if ADAPTED:
        b_s = add_products(b_s, h_ptr, k_ptr, rows, labels, M, C, R, R, BLOCK_D)
    return add_products(b_s, z_ptr, t_ptr, rows, labels, M, C, D, stride_m, BLOCK_D)


@triton.jit
def features_of_pair(z_ptr, t_ptr, h_ptr, k_ptr, image, condition, N, M, C, D, R, stride_b, stride_n):
    """z, t, h and k of one (image, condition): the pointers that ``similarity_block`` takes."""
    pair = image * N + condition
    return (
        z_ptr + image * stride_b + condition * stride_n,
        t_ptr + condition * C * D,
        h_ptr + pair * M * R,
        k_ptr + condition * C * R,
    )


@triton.jit
def load_inverse_norm(inverse_norm_ptr, rows, in_m, ADAPTED: tl.constexpr, BLOCK_M: tl.constexpr):
    """1/|z + up·h| of one pair's rows, by which s becomes a cosine; 1 where nothing is adapted."""
    b_inverse_norm = tl.full((BLOCK_M,), 1.0, tl.float32)
    if ADAPTED:
        b_inverse_norm = tl.load(inverse_norm_ptr + rows, mask=in_m, other=0.0)
    return b_inverse_norm


@triton.jit
def log_row_marginal(b_row_max, in_m, C):
    """log of C times the softmax over the patches of each patch's best x; −inf outside M.

    Both marginals have the total mass C: else the duals would drift apart by ln C in every iteration.
    """
    b_row_max = tl.where(in_m, b_row_max, NEGATIVE_INFINITY)
    highest = tl.max(b_row_max, 0)
    return b_row_max - highest - tl.log(tl.sum(tl.exp(b_row_max - highest), 0) / C)


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
def fold_logsumexp(b_max, b_sum, b_y):
    """Fold the columns of y into running row maxima and sums of exponentials."""
    b_next = tl.maximum(b_max, tl.max(b_y, 1))
    return b_next, b_sum * tl.exp(b_max - b_next) + tl.sum(tl.exp(b_y - b_next[:, None]), 1)
