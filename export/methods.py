"""The methods that a bundle can hold: FedMPT and its baselines, on the same towers and in the same federation.

A method is plain data and functions: which words stand before the labels, which tensors are trained, what text
features they give, and how tokens and text become scores. Everything that is frozen comes in as ``weights``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedmpt import kernels
from fedmpt.export import prompts, towers
from fedmpt.export.towers import TowerSpec, Weights
from fedmpt.protocol.manifest import Pooling, Training

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Setup:
    """The static half of a method's text side; the tensors are in the frozen ``weights``.

    ``phrases`` and ``labels`` hold the token counts of the conditions' and labels' words (a label's with its
    full stop and ``[EOT]``); ``width`` is D, ``text_width`` W; ``adapter_rank`` is
    also the gate's hidden width; ``logit_scale`` is CLIP's, exponentiated.
    """

    method: str
    spec: TowerSpec
    phrases: tuple[int, ...]
    labels: tuple[int, ...]
    width: int
    text_width: int
    condition_context: int
    class_context: int
    adapter_rank: int
    logit_scale: float
    pooling: Pooling


@dataclass(frozen=True)
class Scores:
    """``psi [B, N, C]``, ``gate [B, N]`` and, where asked for, ``plan [B, N, M−1, C]`` (columns sum to 1/C)."""

    psi: Tensor
    gate: Tensor
    plan: Tensor | None


@dataclass(frozen=True)
class Method:
    """One way to tune prompts.

    ``conditioned`` says whether the conditions matter; ``phrases`` gives, from them, the frozen words of each
    prefix, and ``context`` the number of learned tokens in one.
    ``shapes`` names the trained tensors besides ``scale`` and ``bias``; ``text_state`` names those that the text
    features depend on. ``prefixes`` gives the token embeddings of each prompt's prefix after ``[SOS]``;
    ``typical`` is a score, before κ and δ, at which a label is as likely as not.
    """

    name: str
    conditioned: bool
    context: Callable[[Setup], int]
    phrases: Callable[[Sequence[str]], tuple[str, ...]]
    shapes: Callable[[Setup], dict[str, tuple[int, ...]]]
    text_state: tuple[str, ...]
    prefixes: Callable[[State, Sequence[Tensor]], list[list[Tensor]]]
    text: Callable[[Tensor, State], Tensor]
    typical: float
    score: Callable[[Setup, Tensor, Tensor, State, bool], Scores]


def state_shapes(setup: Setup) -> dict[str, tuple[int, ...]]:
    """Name and shape of every trained tensor, in name order."""
    shapes = METHODS[setup.method].shapes(setup) | {"scale": (), "bias": ()}
    return dict(sorted(shapes.items()))


def initial_state(setup: Setup, seed: int) -> dict[str, Tensor]:
    """The state before any round: seeded, and an untouched CLIP where a zero can say so.

    Contexts start as small noise; ``adapter_up`` and ``gate_up`` start at zero, so that tokens are unchanged
    and all conditions weigh the same.
    """
    generator = torch.Generator().manual_seed(seed)
    spread = {"adapter_up": 0.0, "gate_up": 0.0} | dict.fromkeys(
        ("adapter_down", "gate_down", "negative_embedding"), setup.width**-0.5
    )
    state = {}
    for name, shape in state_shapes(setup).items():
        state[name] = torch.randn(shape, generator=generator) * spread.get(name, CONTEXT_SPREAD)
    # Calibration fits both before the first round; until then CLIP's own scale, even odds at a typical score.
    state["scale"] = torch.tensor(setup.logit_scale)
    state["bias"] = torch.tensor(-setup.logit_scale * METHODS[setup.method].typical)
    return state


CONTEXT_SPREAD = 0.02
TYPICAL_COSINE = 0.25  # between a photo and what it shows, in published CLIPs


def text_features(setup: Setup, weights: Weights, state: State) -> Tensor:
    """Text features ``[N, C, D]`` of the state, L2-normalised."""
    method = METHODS[setup.method]
    words = list(torch.split(weights["words.phrases"], list(setup.phrases)))
    prefixes = [torch.cat([weights["words.start"], *parts]) for parts in method.prefixes(state, words)]
    encoded = prompts.encode_prompts(weights, setup.spec, prefixes, weights["words.labels"], setup.labels)
    return method.text(encoded, state)


def score(setup: Setup, tokens: Tensor, text: Tensor, state: State, *, plan: bool = True) -> Scores:
    """Scores of cached tokens ``[B, M, D]``, of any precision, against text features ``[N, C, D]``."""
    return METHODS[setup.method].score(setup, tokens, text, state, plan)


def local_loss(
    setup: Setup, training: Training, weights: Weights, state: State, tokens: Tensor, labels: Tensor
) -> Tensor:
    """The loss of one batch: tokens ``[B, M, D]``, labels int8 ``[B, C]`` (1, 0, −1 unknown)."""
    return head_loss(setup, training, text_features(setup, weights, state), state, tokens, labels)


def head_loss(
    setup: Setup, training: Training, text: Tensor, state: State, tokens: Tensor, labels: Tensor
) -> Tensor:
    """The loss of one batch whose text features ``[N, C, D]`` are there already."""
    scores = score(setup, tokens, text, state, plan=False)
    return kernels.gated_asymmetric_loss(
        scores.psi,
        scores.gate,
        state["scale"],
        state["bias"],
        labels,
        gamma_pos=training.gamma_pos,
        gamma_neg=training.gamma_neg,
        clip=training.clip,
    )


def pool(
    setup: Setup, patches: Tensor, text: Tensor, name: str, state: State, plan: bool
) -> tuple[Tensor, Tensor | None]:
    """Scores ``psi [B, N, C]`` of patches ``[B, M−1, D]`` under a pooling and, where asked for, the plan."""
    adapters = (state["adapter_down"], state["adapter_up"]) if "adapter_up" in state else None
    found = kernels.region_transport(
        patches,
        text,
        logit_scale=setup.logit_scale,
        tau=setup.pooling.tau,
        reg=setup.pooling.reg,
        iterations=setup.pooling.iterations,
        pooling=name,
        adapters=adapters,
        return_plan=plan,
    )
    return found if isinstance(found, tuple) else (found, None)


def _regions(setup: Setup, tokens: Tensor, text: Tensor, state: State, plan: bool) -> Scores:
    """FedMPT: patches transported to the labels of every condition, conditions weighed by the gate."""
    psi, found = pool(setup, tokens[:, 1:], text, setup.pooling.name, state, plan)
    if plan and setup.pooling.name == "max":
        # One patch alone makes no map; how far every patch agrees shows the region and changes no score.
        found = pool(setup, tokens[:, 1:], text, "softmax", state, plan)[1]
    if "gate_up" in state:
        class_token = tokens[:, 0].to(text.dtype)
        gate = torch.softmax(class_token @ state["gate_down"].T @ state["gate_up"].T, dim=-1)
    else:
        gate = _even(text, tokens.shape[0], len(text))
    return Scores(psi, gate, found)


def _global(setup: Setup, tokens: Tensor, text: Tensor, state: State, plan: bool) -> Scores:
    """The class token's similarity, as CLIP and CoOp use it; the plan merely shows where the patches agree."""
    found = pool(setup, tokens[:, 1:], text, "softmax", state, plan)[1] if plan else None
    psi = (tokens[:, 0].to(text.dtype) @ text.flatten(0, 1).T).reshape(-1, *text.shape[:2])
    return Scores(psi, _even(text, tokens.shape[0], 1), found)


def _contrast(setup: Setup, tokens: Tensor, text: Tensor, state: State, plan: bool) -> Scores:
    """Positive minus negative similarity, each pooled over the regions that respond to it (DualCoOp)."""
    patches = tokens[:, 1:].to(text.dtype)
    cosine = (patches @ text.flatten(0, 1).T).reshape(*patches.shape[:2], *text.shape[:2])
    weight = torch.softmax(cosine * (setup.logit_scale / setup.pooling.tau), dim=1)
    # Split: the gradient of a slice would be a scatter, which fewer runtimes take than a concatenation.
    positive, negative = torch.split((weight * cosine).sum(1), 1, dim=1)
    found = weight[:, None, :, 0].detach() / text.shape[1] if plan else None
    return Scores(positive - negative, _even(text, tokens.shape[0], 1), found)


def _even(text: Tensor, images: int, count: int) -> Tensor:
    return text.new_full((1, count), 1 / count).expand(images, count)


def _conditioned_shapes(setup: Setup) -> dict[str, tuple[int, ...]]:
    return {
        "condition_context": (len(setup.phrases), setup.condition_context, setup.text_width),
        "class_context": (setup.class_context, setup.text_width),
    }


def _full_shapes(setup: Setup) -> dict[str, tuple[int, ...]]:
    count, rank = len(setup.phrases), setup.adapter_rank
    return _conditioned_shapes(setup) | {
        "adapter_down": (count, rank, setup.width),
        "adapter_up": (count, setup.width, rank),
        "gate_down": (rank, setup.width),
        "gate_up": (count, rank),
    }


def _conditioned_prefixes(state: State, words: Sequence[Tensor]) -> list[list[Tensor]]:
    return [
        [context, phrase, state["class_context"]]
        for context, phrase in zip(state["condition_context"], words, strict=True)
    ]


def _unchanged(text: Tensor, state: State) -> Tensor:
    return text


def _no_words(count: int) -> Callable[[Sequence[str]], tuple[str, ...]]:
    return lambda conditions: ("",) * count


FEDMPT = Method(
    "fedmpt-prompts",
    conditioned=True,
    context=lambda setup: setup.condition_context + setup.class_context,
    phrases=tuple,
    shapes=_conditioned_shapes,
    text_state=("class_context", "condition_context"),
    prefixes=_conditioned_prefixes,
    text=_unchanged,
    typical=TYPICAL_COSINE,
    score=_regions,
)
METHODS = {
    method.name: method
    for method in (
        FEDMPT,
        replace(FEDMPT, name="fedmpt-full", shapes=_full_shapes),
        Method(
            "coop",
            conditioned=False,
            context=lambda setup: setup.class_context,
            phrases=_no_words(1),
            shapes=lambda setup: {"class_context": (setup.class_context, setup.text_width)},
            text_state=("class_context",),
            prefixes=lambda state, words: [[state["class_context"]]],
            text=_unchanged,
            typical=TYPICAL_COSINE,
            score=_global,
        ),
        Method(
            "dualcoop",
            conditioned=False,
            context=lambda setup: setup.class_context,
            phrases=_no_words(2),
            shapes=lambda setup: {
                "positive_context": (setup.class_context, setup.text_width),
                "negative_context": (setup.class_context, setup.text_width),
            },
            text_state=("negative_context", "positive_context"),
            prefixes=lambda state, words: [[state["positive_context"]], [state["negative_context"]]],
            text=_unchanged,
            typical=0.0,
            score=_contrast,
        ),
        Method(
            "positivecoop",
            conditioned=False,
            context=lambda setup: setup.class_context,
            phrases=_no_words(1),
            shapes=lambda setup: {
                "positive_context": (setup.class_context, setup.text_width),
                "negative_embedding": (len(setup.labels), setup.width),
            },
            text_state=("negative_embedding", "positive_context"),
            prefixes=lambda state, words: [[state["positive_context"]]],
            text=lambda text, state: torch.cat([text, towers.normalise(state["negative_embedding"])[None]]),
            typical=0.0,
            score=_contrast,
        ),
        Method(
            "zero-shot",
            conditioned=False,
            context=lambda setup: 0,
            phrases=lambda conditions: ("a photo of a",),
            shapes=lambda setup: {},
            text_state=(),
            prefixes=lambda state, words: [[phrase] for phrase in words],
            text=_unchanged,
            typical=TYPICAL_COSINE,
            score=_global,
        ),
    )
}

# Controls, which change one thing each: the same prompt on pooled patches instead of the class token, and what can be
# had without training: the mean of wordings' text features (prompt ensembling; Radford et al. 2021), for photos and
# for the two art styles that the micro-CLIP's captions name.
ENSEMBLE_WORDINGS = ("a photo of a", "a flat picture of a", "a sketch picture of a")
_ENSEMBLE = replace(
    METHODS["zero-shot"],
    name="zero-shot-ensemble",
    phrases=lambda conditions: ENSEMBLE_WORDINGS,
    text=lambda text, state: towers.normalise(text.mean(0, keepdim=True)),
)
METHODS |= {
    method.name: method
    for method in (
        replace(METHODS["coop"], name="coop-patches", score=_regions),
        replace(METHODS["zero-shot"], name="zero-shot-patches", score=_regions),
        _ENSEMBLE,
        replace(_ENSEMBLE, name="zero-shot-ensemble-patches", score=_regions),
    )
}
