"""Train the micro-CLIP: ``python -m fedmpt.simulation.micro_clip --out FOLDER``.

CLIP's architecture in small (112 pixels, patches of 16, width 192) learns on ``pretrain`` scenes with captions. For a
batch of pictures and a list of captions a sigmoid loss (Zhai et al. 2023) is put on the similarity of every pair,
once for the class token and once for the best patch; another on every patch and label, since scenes tell what lies
where. So class token and patches both align with text. The result is a folder that
``transformers.CLIPModel.from_pretrained`` loads. Same seed and thread count, same weights, also when resumed.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn import functional
from transformers import CLIPModel

from fedmpt.protocol.errors import FedmptError
from fedmpt.protocol.files import atomic_path, write_atomically
from fedmpt.simulation.micro_clip_captions import (
    ANCHORS,
    Caption,
    anchor_captions,
    anchor_of,
    attribute_captions,
    context_runs,
    label_captions,
    patch_truth_of,
    style_codes,
    truth_of,
)
from fedmpt.simulation.micro_clip_data import TrainingSet, render_training_set
from fedmpt.simulation.micro_clip_model import WIDTH, image_tokens, make_model, save_model, text_features
from fedmpt.simulation.micro_clip_tokenizer import make_tokenizer
from fedmpt.simulation.scenes import Progress
from fedmpt.simulation.scenes_sets import pretrain_specification
from fedmpt.simulation.sprites import LABELS


@dataclass(frozen=True)
class Stage:
    """One cycle of the learning rate, or the beginning of one, on one set of scenes."""

    scenes: int  # which of the sets, from 1
    steps: int
    horizon: int  # steps after which the learning rate would be nothing
    learning_rate: float
    warmup: float  # share of the steps
    patch_weight: float  # of the loss on single patches
    class_weight: float = 1.0  # of the loss on the class token
    easy_until: float = 0.0  # share of the steps on bright pictures without small objects
    anchors_until: float = 0.0  # share of the steps over which the anchors' help fades out
    of_photos: bool = False  # words that name an object are meant of the photo-like styles


@dataclass(frozen=True)
class Recipe:
    """How the micro-CLIP is trained; docs/micro-clip.md tells how the shipped weights differ."""

    stages: tuple[Stage, ...] = (
        Stage(1, 3000, 3000, 1.5e-3, warmup=0.15, patch_weight=10.0, easy_until=0.2, anchors_until=0.5),
        Stage(2, 2600, 4800, 1.2e-3, warmup=0.05, patch_weight=1.0),
        Stage(3, 5000, 5000, 1.0e-3, warmup=0.02, patch_weight=2.0, of_photos=True),
        Stage(3, 3600, 3600, 8.0e-4, warmup=0.02, patch_weight=1.0, class_weight=4.0, of_photos=True),
        Stage(4, 2400, 2400, 6.0e-4, warmup=0.05, patch_weight=1.0, class_weight=4.0, of_photos=True),
    )
    batch: int = 64
    captions: int = 40  # of a batch's pictures, beside one caption for every label
    weight_decay: float = 0.05
    longest_context: int = 8  # vectors in a run of context
    bfloat16: bool = True
    seed: int = 0
    checkpoint_every: int = 200


def pair_loss(
    similarity: torch.Tensor, truth: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """Sigmoid loss of similarities ``[B, Q]`` against their truth, summed over captions, averaged over pictures."""
    logits = scale.exp() * similarity + bias
    return functional.binary_cross_entropy_with_logits(logits, truth, reduction="sum") / len(similarity)


class CheckpointError(FedmptError):
    """A checkpoint that cannot be continued."""


def learning_rate(stage: Stage, step: int) -> float:
    """One cycle: up linearly, down to nothing by a cosine; `step` counts from the stage's begin."""
    peak = max(1, round(stage.warmup * stage.horizon))
    if step < peak:
        return stage.learning_rate * (step + 1) / peak
    return stage.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - peak) / max(1, stage.horizon - peak)))


class Trainer:
    """Model, the loss's two biases and the optimiser, with the number of steps done."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.tokenizer = make_tokenizer()
        self.model = make_model(self.tokenizer, recipe.seed)
        self.biases = torch.nn.Parameter(torch.tensor([-4.0, -4.0]))  # class token, best patch
        # One free vector per label, background, lighting and style. Text features start almost parallel, which
        # teaches the pictures nothing for hundreds of steps; anchors start apart, so that pictures align with
        # them at once and texts follow. They fade out and are thrown away.
        self.anchors = torch.nn.Parameter(torch.randn(ANCHORS, WIDTH))
        self.codes = style_codes(recipe.seed, WIDTH)
        extra = {"biases": self.biases, "anchors": self.anchors}
        self.parameters = {**dict(self.model.named_parameters()), **extra}
        decayed = [p for p in self.parameters.values() if p.ndim >= 2]
        kept = [p for p in self.parameters.values() if p.ndim < 2]
        groups = [
            {"params": decayed, "weight_decay": recipe.weight_decay},
            {"params": kept, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-6)
        self.step = 0  # over all stages

    def stage(self) -> tuple[int, int]:
        """Index of the stage that the next step belongs to, and how many steps of it are done."""
        before = 0
        for index, stage in enumerate(self.recipe.stages):
            if self.step < before + stage.steps:
                return index, self.step - before
            before += stage.steps
        return len(self.recipe.stages), 0

    def train_step(self, data: TrainingSet) -> float:
        """One step on the batch of `data`, its stage's scenes, that (seed, step) decides; returns the loss."""
        recipe = self.recipe
        index, step = self.stage()
        stage = recipe.stages[index]
        generator = np.random.default_rng((recipe.seed, self.step))
        pool = data.easy if step < stage.easy_until * stage.steps else len(data.pixels)
        batch = generator.choice(pool, recipe.batch, replace=False)
        captions = label_captions(generator, stage.of_photos)
        captions += attribute_captions(data, batch[: recipe.captions], generator, stage.of_photos)
        truth = torch.from_numpy(truth_of(captions, data, batch))
        patches = torch.from_numpy(patch_truth_of(captions, data, batch))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(stage, step)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=recipe.bfloat16):
            images = image_tokens(self.model, data.pixels[batch])
            texts = text_features(
                self.model, self.tokenizer, [c.text for c in captions], self._runs(captions, generator)
            )
        by_patch = stage.patch_weight * self._patch_loss(images, texts, patches)
        loss = self._image_loss(images, texts, truth, stage.class_weight) + by_patch
        if step < stage.anchors_until * stage.steps:
            help_of_anchors = 1 - step / (stage.anchors_until * stage.steps)
            anchors = functional.normalize(self.anchors, dim=-1)
            anchor_truth = torch.from_numpy(truth_of(anchor_captions(), data, batch))
            named = [(k, anchor_of(caption)) for k, caption in enumerate(captions) if anchor_of(caption) >= 0]
            rows, targets = torch.tensor(named).T
            nearest = self.model.logit_scale.exp() * texts[rows] @ anchors.T
            aligned = functional.cross_entropy(nearest, targets)
            by_anchor = stage.patch_weight * self._patch_loss(images, anchors, patches)
            by_anchor = by_anchor + self._image_loss(images, anchors, anchor_truth)
            loss = loss + help_of_anchors * (by_anchor + 10 * aligned)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        self.optimizer.step()
        self.step += 1
        return float(loss.detach())

    def _image_loss(
        self, images: torch.Tensor, texts: torch.Tensor, truth: torch.Tensor, class_weight: float = 1.0
    ) -> torch.Tensor:
        """Pair loss of the class token, weighted, and of the best patch."""
        scale = self.model.logit_scale
        whole = pair_loss(images[:, 0] @ texts.T, truth, scale, self.biases[0])
        return class_weight * whole + pair_loss(
            (images[:, 1:] @ texts.T).amax(1), truth, scale, self.biases[1]
        )

    def _patch_loss(self, images: torch.Tensor, texts: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
        """Sigmoid loss of every patch against every label (the first texts): which object lies there."""
        similarity = images[:, 1:].flatten(0, 1) @ texts[: len(LABELS)].T
        return pair_loss(similarity, truth.flatten(0, 1), self.model.logit_scale, self.biases[1])

    def _runs(self, captions: list[Caption], generator: np.random.Generator) -> Iterator[torch.Tensor]:
        """The captions' context vectors, their random part as large as the words' own embeddings."""
        size = float(self.model.text_model.embeddings.token_embedding.weight.detach().std())
        longest = self.recipe.longest_context
        return map(torch.from_numpy, context_runs(captions, generator, size, longest, self.codes))

    def save(self, path: Path) -> None:
        """Write a checkpoint: weights, optimiser moments, step and recipe."""
        tensors = {f"weight.{name}": p.detach() for name, p in self.parameters.items()}
        for name, parameter in self.parameters.items():
            for moment in ("exp_avg", "exp_avg_sq"):
                state = self.optimizer.state.get(parameter)
                if state:
                    tensors[f"{moment}.{name}"] = state[moment]
        metadata = {"step": str(self.step), "recipe": json.dumps(asdict(self.recipe))}
        with atomic_path(path) as temporary:
            save_file({k: v.contiguous().clone() for k, v in tensors.items()}, temporary, metadata)

    def load(self, path: Path) -> None:
        """Go on from a checkpoint of the same recipe.

        :raises CheckpointError: the checkpoint is of another recipe
        """
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            if metadata["recipe"] != json.dumps(asdict(self.recipe)):
                raise CheckpointError(f"{path} is a checkpoint of another recipe: train into another folder")
            self.step = int(metadata["step"])
            for name, parameter in self.parameters.items():
                parameter.data.copy_(file.get_tensor(f"weight.{name}"))
                moments = {m: file.get_tensor(f"{m}.{name}") for m in ("exp_avg", "exp_avg_sq")}
                self.optimizer.state[parameter] = {"step": torch.tensor(float(self.step)), **moments}


def train(
    recipe: Recipe, scenes: Sequence[TrainingSet], folder: Path, progress: Progress | None = None
) -> CLIPModel:
    """Train on the sets of scenes that the stages name, or go on where `folder`'s checkpoint stands.

    Writes the checkpoint, the curve and, at the end, the model into `folder`.
    """
    trainer = Trainer(recipe)
    checkpoint, curve = folder / "checkpoint.safetensors", folder / "curve.csv"
    if checkpoint.exists():
        trainer.load(checkpoint)
    rows = curve.read_text("utf-8").splitlines() if curve.exists() and trainer.step else ["step,loss,seconds"]
    rows = [rows[0]] + [row for row in rows[1:] if int(row.split(",")[0]) <= trainer.step]
    begun, losses = time.monotonic(), []
    total = sum(stage.steps for stage in recipe.stages)
    while trainer.step < total:
        losses.append(trainer.train_step(scenes[recipe.stages[trainer.stage()[0]].scenes - 1]))
        if trainer.step % 50 == 0:
            rows.append(f"{trainer.step},{np.mean(losses):.4f},{time.monotonic() - begun:.0f}")
            losses = []
        if trainer.step % recipe.checkpoint_every == 0 or trainer.step == total:
            trainer.save(checkpoint)
            write_atomically(curve, "\n".join(rows) + "\n")
        if progress is not None:
            progress(trainer.step, total)
    save_model(trainer.model, trainer.tokenizer, folder / "micro-clip")
    return trainer.model


def main(argv: list[str] | None = None) -> int:
    """Render the scenes of all stages, train, write the model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of scenes, checkpoint, curve and model"
    )
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    out: Path = arguments.out
    scenes = [
        render_training_set(
            out / f"scenes-{number}",
            pretrain_specification(min(number, 3)),
            count,
            number - 1,
            _shown(f"scenes {number}"),
        )
        for number, count in enumerate((60_000, 80_000, 80_000, 150_000), start=1)
    ]
    train(Recipe(seed=arguments.seed), scenes, out, _shown("training"))
    return 0


def _shown(what: str) -> Progress | None:
    """A line on stderr that counts, where that is a terminal."""
    if not sys.stderr.isatty():
        return None
    return lambda done, total: print(f"\r{what}: {done}/{total}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
