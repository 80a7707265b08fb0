"""A CLIP transformer as plain functions over a dictionary of frozen weights.

Weights are explicit arguments, never hidden in modules: a traced graph then takes each of them as a named
input, which the exporter turns into external data of one shared file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

Weights = Mapping[str, Tensor]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
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


def take_layers(source: Weights, prefix: str, spec: TowerSpec) -> dict[str, Tensor]:
    """Rename a Hugging Face encoder's weights; matrices become ``[in, out]``, queries come out scaled by 1/√d."""
    weights: dict[str, Tensor] = {}
    names = {
        "query": "self_attn.q_proj",
        "key": "self_attn.k_proj",
        "value": "self_attn.v_proj",
        "out": "self_attn.out_proj",
        "up": "mlp.fc1",
        "down": "mlp.fc2",
        "norm1": "layer_norm1",
        "norm2": "layer_norm2",
    }
    for layer in range(spec.layers):
        for here, there in names.items():
            for kind in ("weight", "bias"):
                value = source[f"{prefix}.encoder.layers.{layer}.{there}.{kind}"]
                if here == "query":
                    value = value * (value.shape[0] // spec.heads) ** -0.5
                weights[f"layers.{layer}.{here}.{kind}"] = value.T.contiguous() if value.ndim == 2 else value
    return weights


def linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    """``x [..., in]`` to ``[..., out]``."""
    weight, bias = weights[f"{name}.weight"], weights.get(f"{name}.bias")
    if bias is None:
        return x @ weight
    return torch.addmm(bias, x, weight) if x.ndim == 2 else x @ weight + bias


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


def split_heads(x: Tensor, spec: TowerSpec) -> Tensor:
    """``[B, T, W]`` to ``[B, heads, T, d]``."""
    return x.reshape(*x.shape[:-1], spec.heads, -1).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """``[B, heads, T, d]`` to ``[B, T, W]``."""
    return x.transpose(1, 2).flatten(2)


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention of every query to every key, written out so that any exporter and gradient takes it."""
    return torch.softmax(query @ key.transpose(-1, -2), dim=-1) @ value


def normalise(x: Tensor) -> Tensor:
    """Unit length over the last dimension (a zero vector stays zero)."""
    return functional.normalize(x, dim=-1)
