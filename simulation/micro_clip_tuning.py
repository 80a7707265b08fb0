"""Tune on a federation's pictures, centrally: prompts, adapters, and prompts of the vocabulary's own tokens.

The last is the strongest thing that words could do: a search that sees the labels, over all that can be written.
"""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional
from transformers import CLIPModel, CLIPTokenizer

from fedmpt.simulation.micro_clip_model import WIDTH, text_features, text_features_of
from fedmpt.simulation.micro_clip_wordings import PROMPT

LONGEST = 40  # tokens around a label that are searched for

Pictures = tuple[torch.Tensor, np.ndarray]  # image tokens [n, M, D], labels [n, C]


def similarities(tokens: torch.Tensor, text: torch.Tensor) -> dict[str, torch.Tensor]:
    """``[n, C]`` of the class token and of the best patch."""
    return {"class_token": tokens[:, 0] @ text.T, "best_patch": (tokens[:, 1:] @ text.T).amax(1)}


def mean_average_precision(scores: np.ndarray, labels: np.ndarray) -> float:
    """Mean over labels (those that some picture shows) of the average precision; ties keep the pictures' order."""
    values = []
    for score, truth in zip(scores.T, labels.T, strict=True):
        if truth.any():
            ranked = truth[np.argsort(-score, kind="stable")]
            precision = np.cumsum(ranked) / np.arange(1, len(ranked) + 1)
            values.append(precision[ranked == 1].mean())
    return float(np.mean(values))


def tune(
    model: CLIPModel,
    tokenizer: CLIPTokenizer,
    method: str,
    pooling: str,
    train: Pictures,
    test: Pictures,
    names: tuple[str, ...],
    seed: int,
    epochs: int = 20,
) -> float:
    """Train ``coop`` (four context vectors) or ``adapter`` (rank 32 on the tokens); mAP on the test set."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        fixed = text_features(model, tokenizer, [PROMPT.format(name) for name in names])
    texts = _embedded(model, tokenizer, [f"{name} ." for name in names])
    if method == "coop":
        trained = [torch.randn(4, WIDTH, generator=generator) * 0.02]
    else:
        trained = [torch.randn(32, WIDTH, generator=generator) * WIDTH**-0.5, torch.zeros(WIDTH, 32)]
    scale, bias = torch.tensor(15.0), torch.tensor(-6.0)
    for tensor in (*trained, scale, bias):
        tensor.requires_grad_()

    def scores(tokens: torch.Tensor) -> torch.Tensor:
        if method == "coop":
            context = trained[0]  # [SOS] context name . [EOT]
            return similarities(tokens, _features(model, tokenizer, context, texts, context[:0]))[pooling]
        moved = tokens + functional.linear(functional.linear(tokens, trained[0]), trained[1])
        return similarities(functional.normalize(moved, dim=-1), fixed)[pooling]

    tokens, labels = train[0], torch.from_numpy(train[1]).float()
    with torch.no_grad():
        start = scores(tokens)
    _calibrate(start, labels, scale, bias)
    rates = (4e-3, 4e-2)
    optimizer = torch.optim.AdamW(
        [{"params": trained, "lr": rates[0]}, {"params": [scale, bias], "lr": rates[1]}], weight_decay=0.0
    )
    for epoch in range(epochs):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * 0.5 * (1 + np.cos(np.pi * epoch / epochs))
        order = torch.randperm(len(tokens), generator=generator)
        for part in torch.split(order, 50):
            loss = functional.binary_cross_entropy_with_logits(
                scale * scores(tokens[part]) + bias, labels[part]
            )
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    with torch.no_grad():
        return mean_average_precision(scores(test[0]).numpy(), test[1])


def _calibrate(scores: torch.Tensor, labels: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> None:
    """Fit scale and bias on fixed scores first, so that prompts need not carry the calibration."""
    optimizer = torch.optim.LBFGS([scale, bias], max_iter=50)

    def closure() -> float:
        optimizer.zero_grad()
        loss = functional.binary_cross_entropy_with_logits(scale * scores + bias, labels)
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    optimizer.step(closure)  # type: ignore[no-untyped-call]


@torch.no_grad()
def _embedded(model: CLIPModel, tokenizer: CLIPTokenizer, texts: list[str]) -> list[torch.Tensor]:
    """The embeddings ``[k, W]`` of each text's tokens."""
    embedding = model.text_model.embeddings.token_embedding
    return [embedding(torch.tensor(ids)) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]


def _features(
    model: CLIPModel,
    tokenizer: CLIPTokenizer,
    before: torch.Tensor,
    texts: list[torch.Tensor],
    after: torch.Tensor,
) -> torch.Tensor:
    """Features ``[C, D]`` of each embedded text between two runs of embeddings ``[k, W]``."""
    weight = model.text_model.embeddings.token_embedding.weight
    begin, end = weight[tokenizer.bos_token_id], weight[tokenizer.eos_token_id]
    rows = [torch.cat([begin[None], before, words, after, end[None]]) for words in texts]
    last = torch.tensor([len(row) - 1 for row in rows])
    return text_features_of(model, torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), last)


@torch.no_grad()
def search_tokens(
    model: CLIPModel,
    tokenizer: CLIPTokenizer,
    pooling: str,
    train: Pictures,
    test: Pictures,
    names: tuple[str, ...],
    seed: int,
    tries: int,
    changes: int,
) -> dict[str, float]:
    """mAP on the test set of the best of `tries` random token sequences around a label, chosen on the training set
    (``random``), and after `changes` single tokens were changed, put in or taken out, each kept where it helped there
    (``climbed``)."""
    generator = np.random.default_rng(seed)
    embeddings = model.text_model.embeddings.token_embedding.weight
    texts = _embedded(model, tokenizer, list(names))
    vocabulary = min(tokenizer.bos_token_id, tokenizer.eos_token_id)  # these two come last

    def score(tokens: list[int], place: int, pictures: Pictures) -> float:
        before, after = (
            embeddings[torch.tensor(part, dtype=torch.long)] for part in (tokens[:place], tokens[place:])
        )
        text = _features(model, tokenizer, before, texts, after)
        return mean_average_precision(similarities(pictures[0], text)[pooling].numpy(), pictures[1])

    best: tuple[float, list[int], int] = (-1.0, [], 0)
    for _ in range(tries):
        tokens = generator.integers(0, vocabulary, int(generator.integers(1, 25))).tolist()
        place = int(generator.integers(len(tokens) + 1))
        best = max(best, (score(tokens, place, train), tokens, place))
    report = {"random": score(*best[1:], test)}
    for _ in range(changes):
        tokens, place = _changed(*best[1:], vocabulary, generator)
        best = max(best, (score(tokens, place, train), tokens, place))
    return report | {"climbed": score(*best[1:], test)}


def _changed(
    tokens: list[int], place: int, vocabulary: int, generator: np.random.Generator
) -> tuple[list[int], int]:
    """The tokens with one of them changed, put in or taken out, and the label's place among them."""
    tokens = list(tokens)
    kind, at = generator.random(), int(generator.integers(len(tokens) + 1))
    new = int(generator.integers(vocabulary))
    if not tokens or (kind < 0.15 and len(tokens) < LONGEST):
        tokens.insert(at, new)
        return tokens, place + (at < place)
    at = min(at, len(tokens) - 1)
    if kind < 0.3:
        del tokens[at]
        return tokens, place - (at < place)
    tokens[at] = new
    return tokens, place
