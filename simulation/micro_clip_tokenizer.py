"""The micro-CLIP's tokenizer: CLIP's byte-level BPE with a small vocabulary learned from the captions."""

from __future__ import annotations

import json

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from fedmpt.simulation.micro_clip_captions import all_sentences

VOCABULARY = 1024  # at most; the captions hold fewer merges worth having
CONTEXT_LENGTH = 77


def make_tokenizer() -> CLIPTokenizer:
    """Learn the merges; ids in CLIP's order: bytes, bytes that end a word, merges, start of text, end of text."""
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer = normalizers.Lowercase()
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Punctuation(),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, end_of_word_suffix="</w>", show_progress=False, min_frequency=1
    )
    learner.train_from_iterator(all_sentences(), trainer)
    merges = [tuple(merge) for merge in json.loads(learner.to_str())["model"]["merges"]]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = alphabet + [letter + "</w>" for letter in alphabet] + ["".join(merge) for merge in merges]
    words = list(dict.fromkeys(words))
    ids = {word: index for index, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=ids, merges=merges, model_max_length=CONTEXT_LENGTH)
