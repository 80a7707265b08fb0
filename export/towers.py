"""A CLIP transformer as plain functions over a dictionary of frozen weights.

Weights are explicit arguments, never hidden in modules: a traced graph then takes each of them as a named
input, which the exporter turns into external data of one shared file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

Weights = Mapping[str, Tensor]

ACTIVATIONS = {
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "gelu": functional.gelu,
    "gelu_new": lambda x: functional.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}


@dataclass(frozen=True)
class TowerSpec:
    """What the weights' shapes do not tell. ``epsilon`` is the layer norms'."""

    layers: int
    heads: int
    activation: str
    epsilon: float


def take_layers(source: Weights, prefix: str, layers: int) -> dict[str, Tensor]:
    """Rename a Hugging Face encoder's weights; query, key and value projections become one matrix."""
    weights: dict[str, Tensor] = {}
    for index in range(layers):
        there, here = f"{prefix}.encoder.layers.{index}", f"layers.{index}"
        for kind in ("weight", "bias"):
            weights[f"{here}.qkv.{kind}"] = torch.cat(
                [source[f"{there}.self_attn.{name}_proj.{kind}"] for name in "qkv"]
            )
            weights[f"{here}.out.{kind}"] = source[f"{there}.self_attn.out_proj.{kind}"]
            weights[f"{here}.norm1.{kind}"] = source[f"{there}.layer_norm1.{kind}"]
            weights[f"{here}.norm2.{kind}"] = source[f"{there}.layer_norm2.{kind}"]
            weights[f"{here}.up.{kind}"] = source[f"{there}.mlp.fc1.{kind}"]
            weights[f"{here}.down.{kind}"] = source[f"{there}.mlp.fc2.{kind}"]
    return weights


def linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    """``x [..., in]`` to ``[..., out]``."""
    return functional.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))


def norm(weights: Weights, name: str, x: Tensor, spec: TowerSpec) -> Tensor:
    """Layer norm over the last dimension."""
    weight = weights[f"{name}.weight"]
    return functional.layer_norm(x, weight.shape, weight, weights[f"{name}.bias"], spec.epsilon)


def feed_forward(weights: Weights, layer: str, x: Tensor, spec: TowerSpec) -> Tensor:
    """The residual second half of a block: ``x + down(activation(up(norm2(x))))``."""
    hidden = ACTIVATIONS[spec.activation](
        linear(weights, f"{layer}.up", norm(weights, f"{layer}.norm2", x, spec))
    )
    return x + linear(weights, f"{layer}.down", hidden)


def split_heads(qkv: Tensor, spec: TowerSpec) -> tuple[Tensor, Tensor, Tensor]:
    """``[B, T, 3W]`` to query (scaled by 1/√d), key and value, each ``[B, heads, T, d]``."""
    batch, length, width = qkv.shape
    parts = qkv.reshape(batch, length, 3, spec.heads, width // (3 * spec.heads)).permute(2, 0, 3, 1, 4)
    query, key, value = parts.unbind(0)
    return query * query.shape[-1] ** -0.5, key, value


def merge_heads(x: Tensor) -> Tensor:
    """``[B, heads, T, d]`` to ``[B, T, W]``."""
    return x.transpose(1, 2).flatten(2)


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention of every token to every token, written out so that any exporter and gradient takes it."""
    return torch.softmax(query @ key.transpose(-1, -2), dim=-1) @ value


def normalise(x: Tensor) -> Tensor:
    """Unit length over the last dimension (a zero vector stays zero)."""
    return functional.normalize(x, dim=-1)
