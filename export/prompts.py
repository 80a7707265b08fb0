"""Prefix-shared encoding of N × C prompts by a causal text tower: exact, and nothing is computed twice.

Prompt (n, c) is prefix n followed by suffix c. Causality makes a prefix's hidden states the same for every
suffix, so each prefix runs once and the suffixes attend to its keys and values. All rows that are needed, and
no others, lie packed in one matrix ``[R, W]`` (the N prefixes, then for each prefix the C suffixes), so that
the linear layers, nearly all of the work, see no padding; only attention spreads them, in pieces of one head, into
padded blocks. One gather does that, and splits the heads, which costs less than permuting a block of five axes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedmpt.export import towers
from fedmpt.export.towers import TowerSpec, Weights


@dataclass(frozen=True)
class Layout:
    """Lengths in tokens of the N prefixes (with ``[SOS]``) and of the C suffixes (with ``[EOT]``)."""

    prefixes: tuple[int, ...]
    suffixes: tuple[int, ...]


def encode_prompts(
    weights: Weights, spec: TowerSpec, prefixes: Sequence[Tensor], suffixes: Tensor, lengths: tuple[int, ...]
) -> Tensor:
    """Text features of every prefix with every suffix.

    Args:
        prefixes: N matrices ``[P_n, W]`` of token embeddings, each from ``[SOS]`` on.
        suffixes: ``[ΣL_c, W]``, the C suffixes' token embeddings one after the other, each up to ``[EOT]``.
        lengths: the C lengths L_c.

    Returns:
        ``[N, C, D]``, L2-normalised: the tower's output at ``[EOT]``, projected.
    """
    layout = Layout(tuple(len(prefix) for prefix in prefixes), lengths)
    index = _index(layout, spec.heads, suffixes.device)
    repeated = suffixes.expand(len(prefixes), *suffixes.shape).flatten(0, 1)
    x = torch.cat([*prefixes, repeated]) + weights["position"].index_select(0, index.position)
    for number in range(spec.layers - 1):
        layer = f"layers.{number}"
        inside = towers.norm(weights, f"{layer}.norm1", x, spec)
        x = x + towers.linear(weights, f"{layer}.out", _attend(weights, layer, inside, index, spec))
        x = towers.feed_forward(weights, layer, x, spec)
    # Of the last block only the rows of [EOT] are wanted; the others serve as keys and values.
    layer = f"layers.{spec.layers - 1}"
    inside = towers.norm(weights, f"{layer}.norm1", x, spec)
    x = _take(x, index.end, index.end_back)
    x = x + towers.linear(weights, f"{layer}.out", _attend_end(weights, layer, inside, index, spec))
    x = towers.feed_forward(weights, layer, x, spec)
    features = towers.linear(weights, "projection", towers.norm(weights, "last_norm", x, spec))
    return towers.normalise(features).reshape(len(prefixes), len(lengths), -1)


class _Take(torch.autograd.Function):
    """``rows[index]`` where each row is wanted at most once: the adjoint is a gather too, not a slow scatter.

    ``back[r]`` is the place of row r in the result, or ``len(index)`` for a row that is not taken. Places of
    padding may hold any row: no gradient arrives there, for attention masks them.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, back: Tensor, takes_all: bool) -> Tensor:
        ctx.back, ctx.takes_all = back, takes_all
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        if not ctx.takes_all:
            gradient = torch.cat([gradient, gradient.new_zeros(1, gradient.shape[1])])
        return gradient.index_select(0, ctx.back), None, None, None


def _take(rows: Tensor, index: Tensor, back: Tensor, *, takes_all: bool = False) -> Tensor:
    """``rows[index]``; where it ``takes_all`` of the rows, the adjoint needs no row of zeros."""
    taken: Tensor = _Take.apply(rows, index, back, takes_all)  # type: ignore[no-untyped-call]
    return taken


@dataclass(frozen=True)
class _Index:
    """Constant indices and additive masks of a layout.

    R packed rows make R·heads pieces. Padded places of pieces: prefixes ``[N, heads, P]``, then suffixes
    ``[N, heads, C, L]``; Q of them in all.
    """

    position: Tensor  # [R] position of each row in its prompt
    spread: Tensor  # [Q] piece of each padded place (padding: piece 0)
    spread_back: Tensor  # [R·heads] padded place of each piece
    gather_back: Tensor  # [Q] as spread, but R·heads for padding
    end: Tensor  # [N·C] packed row of each [EOT]
    end_back: Tensor  # [R] its inverse, N·C elsewhere
    causal: Tensor  # [P, P]
    prefix_mask: Tensor  # [N, 1, 1, 1, P]
    suffix_mask: Tensor  # [L, L]
    end_mask: Tensor  # [C, 1, L]


def _attend(weights: Weights, layer: str, x: Tensor, index: _Index, spec: TowerSpec) -> Tensor:
    """Causal attention of all rows, ``[R, W]`` to ``[R, W]``."""
    query, own_query = _spread(towers.linear(weights, f"{layer}.query", x), index, spec)
    key, own_key = _spread(towers.linear(weights, f"{layer}.key", x), index, spec)
    value, own_value = _spread(towers.linear(weights, f"{layer}.value", x), index, spec)
    prefix = _mix(torch.softmax(_products(query, key) + index.causal, dim=-1), value)
    suffix = _attend_suffix(own_query, key, value, own_key, own_value, index.prefix_mask, index.suffix_mask)
    pieces = torch.cat([prefix.flatten(0, -2), suffix.flatten(0, -2)])
    return _take(pieces, index.spread_back, index.gather_back).reshape(x.shape)


def _attend_end(weights: Weights, layer: str, x: Tensor, index: _Index, spec: TowerSpec) -> Tensor:
    """Attention of the ``[EOT]`` rows to all: ``[R, W]`` to ``[N·C, W]``."""
    key, own_key = _spread(towers.linear(weights, f"{layer}.key", x), index, spec)
    value, own_value = _spread(towers.linear(weights, f"{layer}.value", x), index, spec)
    query = towers.linear(weights, f"{layer}.query", _take(x, index.end, index.end_back))
    query = query.reshape(*own_key.shape[:1], own_key.shape[2], 1, spec.heads, -1).permute(0, 3, 1, 2, 4)
    mixed = _attend_suffix(query, key, value, own_key, own_value, index.prefix_mask, index.end_mask)
    return mixed.permute(0, 2, 3, 1, 4).flatten(-2).flatten(0, -2)


def _spread(rows: Tensor, index: _Index, spec: TowerSpec) -> tuple[Tensor, Tensor]:
    """Packed rows ``[R, W]`` to prefixes ``[N, heads, P, d]`` and suffixes ``[N, heads, C, L, d]``."""
    count, longest = index.prefix_mask.shape[0], index.causal.shape[0]
    labels, _, longest_suffix = index.end_mask.shape
    pieces = rows.reshape(len(rows) * spec.heads, -1)
    padded = _take(pieces, index.spread, index.spread_back, takes_all=True)
    prefix, suffix = torch.split(
        padded, [count * spec.heads * longest, count * spec.heads * labels * longest_suffix]
    )
    return (
        prefix.reshape(count, spec.heads, longest, -1),
        suffix.reshape(count, spec.heads, labels, longest_suffix, -1),
    )


class _Products(torch.autograd.Function):
    """``query [B, Q, d]`` times ``key [B, K, d]`` transposed; no gradient is made transposed and turned after."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor) -> Tensor:
        ctx.save_for_backward(query, key)
        return query @ key.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        query, key = ctx.saved_tensors
        return gradient @ key, gradient.transpose(1, 2) @ query


def _products(query: Tensor, key: Tensor) -> Tensor:
    """``[..., Q, d]`` and ``[..., K, d]`` to ``[..., Q, K]``.

    Flattened to one axis before the transposition, so that engines take it into the product.
    """
    products: Tensor = _Products.apply(query.flatten(0, -3), key.flatten(0, -3))  # type: ignore[no-untyped-call]
    return products.reshape(*query.shape[:-1], -1)


def _mix(weight: Tensor, value: Tensor) -> Tensor:
    """``[..., Q, K]`` and ``[..., K, d]`` to ``[..., Q, d]``."""
    mixed = weight.flatten(0, -3) @ value.flatten(0, -3)
    return mixed.reshape(*weight.shape[:-1], -1)


def _attend_suffix(
    query: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    own_key: Tensor,
    own_value: Tensor,
    prefix_mask: Tensor,
    own_mask: Tensor,
) -> Tensor:
    """Suffix queries ``[N, heads, C, Q, d]`` over the prefix ``[N, heads, P, d]`` and their own suffix."""
    far = _products(query.flatten(2, 3), prefix_key).reshape(*query.shape[:-1], -1) + prefix_mask
    near = _products(query, own_key) + own_mask
    weight = torch.softmax(torch.cat([far, near], dim=-1), dim=-1)
    far, near = torch.split(weight, [far.shape[-1], near.shape[-1]], dim=-1)
    return _mix(far.flatten(2, 3), prefix_value).reshape(query.shape) + _mix(near, own_value)


@cache  # never emptied: a captured CUDA graph goes on reading these tensors
def _index(layout: Layout, heads: int, device: torch.device) -> _Index:
    prefixes, suffixes = np.array(layout.prefixes), np.array(layout.suffixes)
    longest, longest_suffix = int(prefixes.max()), int(suffixes.max())
    count, labels = len(prefixes), len(suffixes)
    # Which padded places are real, in the order of the packed rows.
    real_prefix = np.arange(longest) < prefixes[:, None]
    real_suffix = np.broadcast_to(
        np.arange(longest_suffix) < suffixes[:, None], (count, labels, longest_suffix)
    )
    real = np.concatenate([real_prefix.ravel(), real_suffix.ravel()])
    rows = int(real.sum())
    # The piece at each padded place: places in the order of the blocks, rows times heads.
    packed = np.full(len(real), -1)
    packed[real] = np.arange(rows)
    prefix_rows, suffix_rows = np.split(packed, [count * longest])
    blocks = (
        prefix_rows.reshape(count, 1, longest),
        suffix_rows.reshape(count, 1, labels * longest_suffix),
    )
    head = np.arange(heads)[:, None]
    gather_back = np.concatenate(
        [np.where(block < 0, rows * heads, block * heads + head).ravel() for block in blocks]
    )
    taken = np.flatnonzero(gather_back < rows * heads)
    spread_back = np.empty(rows * heads, int)
    spread_back[gather_back[taken]] = taken
    position = np.concatenate(
        [
            np.broadcast_to(np.arange(longest), real_prefix.shape).ravel(),
            (prefixes[:, None, None] + np.zeros((labels, 1), int) + np.arange(longest_suffix)).ravel(),
        ]
    )[real]
    end = prefixes.sum() + np.arange(count)[:, None] * suffixes.sum() + np.cumsum(suffixes) - 1
    end_back = np.full(rows, count * labels)
    end_back[end.ravel()] = np.arange(count * labels)

    def mask(allowed: np.ndarray[Any, np.dtype[np.bool_]]) -> Tensor:
        return torch.from_numpy(np.where(allowed, 0.0, -np.inf).astype(np.float32)).to(device)

    def integers(values: np.ndarray[Any, Any]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values.ravel(), dtype=np.int64)).to(device)

    return _Index(
        position=integers(position),
        spread=integers(np.where(gather_back < rows * heads, gather_back, 0)),
        spread_back=integers(spread_back),
        gather_back=integers(gather_back),
        end=integers(end),
        end_back=integers(end_back),
        causal=mask(np.tri(longest, dtype=bool)),
        prefix_mask=mask(real_prefix[:, None, None, None, :]),
        suffix_mask=mask(np.tri(longest_suffix, dtype=bool)),
        end_mask=mask(np.arange(longest_suffix) < suffixes[:, None, None]),
    )
