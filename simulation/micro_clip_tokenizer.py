"""The micro-CLIP's tokenizer: CLIP's byte-level BPE with a small vocabulary learned from the captions."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection
from itertools import pairwise

from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer

from fedmpt.simulation.micro_clip_captions import all_sentences

CONTEXT_LENGTH = 77
_END = "</w>"


def make_tokenizer() -> CLIPTokenizer:
    """Learn the merges; ids in CLIP's order: bytes, bytes that end a word, merges, start of text, end of text."""
    words = set(re.findall(r"[a-z]+|[^\sa-z]+", " ".join(all_sentences()).lower()))
    merges = learn_merges(words)
    letters = sorted(ByteLevel.alphabet())
    tokens = letters + [letter + _END for letter in letters] + ["".join(merge) for merge in merges]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    ids = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=ids, merges=merges, model_max_length=CONTEXT_LENGTH)


def learn_merges(words: Collection[str]) -> list[tuple[str, str]]:
    """Byte-pair encoding (Sennrich et al. 2016) until every word is one token.

    Own code because the `tokenizers` trainer breaks ties between equally frequent pairs differently in every process;
    here the alphabetically first pair goes first. Every word counts once, so that templates may change.
    """
    spelled = {word: (*word[:-1], word[-1] + _END) for word in sorted(words)}
    merges: list[tuple[str, str]] = []
    while True:
        pairs: Counter[tuple[str, str]] = Counter()
        for parts in spelled.values():
            for pair in pairwise(parts):
                pairs[pair] += 1
        if not pairs:
            return merges
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        spelled = {word: _merge(parts, best) for word, parts in spelled.items()}


def _merge(parts: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    merged: list[str] = []
    for part in parts:
        if merged and (merged[-1], part) == pair:
            merged[-1] += part
        else:
            merged.append(part)
    return tuple(merged)
