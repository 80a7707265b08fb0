"""Sentences about a label that an operator could try on a micro-CLIP without training."""

from __future__ import annotations

import numpy as np

from fedmpt.export.methods import ENSEMBLE_WORDINGS
from fedmpt.simulation.micro_clip_captions import CAPTION_WORDS, CONDITIONS, VALUES

PROMPT = "a photo of a {}."
# What an operator would try first: other sentences, the named styles, the conditions; all but the fifth in words that
# captions have.
WORDINGS = (
    PROMPT,
    "a picture of a {}.",
    "{}.",
    "there is a {}.",
    "a photo, drawing or painting of a {} in any style.",
    *(f"a {style} picture of a {{}}." for style in VALUES["style"]),
    *(f"{condition} {{}} ." for condition in CONDITIONS),
)
# What the method zero-shot-ensemble averages: the best that was found.
STYLE_WORDINGS = tuple(f"{wording} {{}}." for wording in ENSEMBLE_WORDINGS)
# Long sentences of words that no caption has: an untrained tokenizer piece is as free as a context vector. The first
# were found by trying, on weights for which such words had not been among the captions; `strange_wordings` adds others.
FOUND = (
    "which of these pictures contain some kind of {}?",
    "which of these pictures, photographs, drawings, sketches, mosaics contain some kind of {}?",
    "in every one of these images, whether photographed or drawn, one can see some kind of {}!",
    "wqiqz gvs siopv tdich uj nfbq wqiqz gvs siopv tdich uj nfbq {} .",
)
OUTSIDE = (
    "which these contain some kind every whether one can see here we find example depicted illustration rendering "
    "several people various looking around please tell me about everything that shows anything like it somewhere "
    "maybe printed cartoon artwork version beautiful ancient digital colourful sculpture poster tattoo logo"
)


def strange_wordings(count: int = 60, seed: int = 0) -> tuple[str, ...]:
    """FOUND, and sentences of 4 to 12 words that no caption has, the label among them."""
    generator = np.random.default_rng(seed)
    words = [word for word in OUTSIDE.split() if word not in CAPTION_WORDS]
    sentences = list(FOUND)
    while len(sentences) < count:
        chosen = generator.choice(words, int(generator.integers(4, 13))).tolist()
        chosen.insert(int(generator.integers(len(chosen) + 1)), "{}")
        sentences.append(" ".join(chosen) + " .")
    return tuple(sentences)
