"""Train the micro-CLIP: ``python -m fedmpt.simulation.micro_clip --out FOLDER``.

CLIP's architecture in small (112 pixels, patches of 16, width 192) learns on ``pretrain`` scenes with captions. For a
batch of pictures and a list of captions a sigmoid loss (Zhai et al. 2023) is put on the similarity of every pair,
once for the class token and once for the best patch; another on every patch and label, since scenes tell what lies
where. So class token and patches both align with text. The result is a folder that
``transformers.CLIPModel.from_pretrained`` loads. Same seed, threads, PyTorch and NumPy, same weights, also when
resumed. The scenes are drawn first, into 14.1 GB of files; the same command goes on where a training was interrupted.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from torch.nn import functional

from fedmpt.protocol.errors import FedmptError
from fedmpt.simulation.micro_clip_captions import (
    ANCHORS,
    Caption,
    anchor_captions,
    anchor_of,
    attribute_captions,
    captions_digest,
    context_runs,
    label_captions,
    patch_truth_of,
    style_codes,
    truth_of,
)
from fedmpt.simulation.micro_clip_checkpoint import Curve, load_checkpoint, save_checkpoint
from fedmpt.simulation.micro_clip_data import SceneFolder, TrainingSet, check_room
from fedmpt.simulation.micro_clip_model import WIDTH, image_tokens, make_model, save_model, text_features
from fedmpt.simulation.micro_clip_tokenizer import make_tokenizer
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
    """How the micro-CLIP is trained."""

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


RECIPE = Recipe()
PICTURES = (60_000, 80_000, 80_000, 150_000)  # in each set of scenes
ROW_EVERY = 50  # steps, of the curve
Report = Callable[[str, str, int, int], None]  # what is done, a note or "", how much of it, of how much


def _silent(task: str, note: str, done: int, total: int) -> None:
    pass


def pair_loss(
    similarity: torch.Tensor, truth: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """Sigmoid loss of similarities ``[B, Q]`` against their truth, summed over captions, averaged over pictures."""
    logits = scale.exp() * similarity + bias
    return functional.binary_cross_entropy_with_logits(logits, truth, reduction="sum") / len(similarity)


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


def train(recipe: Recipe, scenes: Sequence[SceneFolder], folder: Path, report: Report = _silent) -> Path:
    """Train on the sets of scenes that the stages name, or go on where `folder`'s checkpoint stands.

    Draws the scenes that are missing, writes checkpoint and curve into `folder`, at the end the model, and returns
    the model's folder.

    :raises CheckpointError: the checkpoint is damaged, or of another recipe or other scenes
    :raises SceneError: a set of scenes is damaged or another one, or the disk is too full
    """
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint, rows = folder / "checkpoint.safetensors", folder / "curve.csv"
    for path in (checkpoint, rows):
        for leftover in folder.glob(f".{path.name}.*.part"):  # of a training that was killed while it wrote
            leftover.unlink()
    trainer = Trainer(recipe)
    origin = {
        "recipe": json.dumps(asdict(recipe)),
        "set of scenes": " ".join(each.digest for each in scenes),
        "set of captions": captions_digest(),
    }
    if checkpoint.exists():
        trainer.step = load_checkpoint(checkpoint, trainer.parameters, trainer.optimizer, origin)
    total = sum(stage.steps for stage in recipe.stages)
    sets = _rendered(scenes, folder, report) if trainer.step < total else []
    curve = Curve(rows, trainer.step)
    curve.write()  # a folder that cannot be written to shows now
    losses: list[float] = []
    while trainer.step < total:
        losses.append(trainer.train_step(sets[recipe.stages[trainer.stage()[0]].scenes - 1]))
        keep = trainer.step % recipe.checkpoint_every == 0 or trainer.step == total
        note = ""
        if keep or trainer.step % ROW_EVERY == 0:
            note = curve.add(trainer.step, float(np.mean(losses)))
            losses = []
        if keep:
            curve.write()  # first: rows beyond the checkpoint do no harm, missing ones would
            save_checkpoint(checkpoint, trainer.parameters, trainer.optimizer, trainer.step, origin)
        report("training", note if keep else "", trainer.step, total)
    save_model(trainer.model, trainer.tokenizer, folder / "micro-clip")
    return folder / "micro-clip"


def _rendered(scenes: Sequence[SceneFolder], folder: Path, report: Report) -> list[TrainingSet]:
    """All sets, once it is sure that none of them will fail."""
    check_room(folder, scenes)
    return [each.render(partial(report, each.path.name, "")) for each in scenes]


def main(argv: list[str] | None = None) -> int:
    """Train and say where the model is; returns 0 done, 1 failed, 130 interrupted."""
    parser = argparse.ArgumentParser(prog="python -m fedmpt.simulation.micro_clip", description=__doc__)
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of scenes (14.1 GB), checkpoint, curve and model"
    )
    parser.add_argument("--seed", type=int, default=RECIPE.seed, help="of weights and batches (0)")
    parser.add_argument("--threads", type=int, default=1, help="processor cores to use (1)")
    arguments = parser.parse_args(argv)
    if not 1 <= arguments.threads <= 1024:
        parser.error("--threads must be from 1 to 1024")
    if not 0 <= arguments.seed < 1 << 32:
        parser.error("--seed must be from 0 to 4294967295")
    torch.set_num_threads(arguments.threads)
    out: Path = arguments.out
    scenes = [
        SceneFolder(out / f"scenes-{number}", pretrain_specification(min(number, 3)), count, number - 1)
        for number, count in enumerate(PICTURES, start=1)
    ]
    try:
        with _shown() as report:
            model = train(replace(RECIPE, seed=arguments.seed), scenes, out, report)
    except KeyboardInterrupt:
        print("micro_clip: interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    except FedmptError as error:
        print(f"micro_clip: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        place, reason = error.filename or out, error.strerror or error
        print(
            f"micro_clip: {place}: {reason}; give --out a folder that you may write, with room",
            file=sys.stderr,
        )
        return 1
    print(f"model: {model}")
    return 0


@contextmanager
def _shown() -> Iterator[Report]:
    """Bars on stderr where that is a terminal; else lines for a log, at checkpoints and every 10,000 pictures."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:

        def report(task: str, note: str, done: int, total: int) -> None:
            if not console.is_terminal:
                if note or done % 10_000 == 0 or done == total:
                    print(f"{task}: {done}/{total}{note and ', '}{note}", file=sys.stderr, flush=True)
                return
            if task not in tasks:
                tasks[task] = bars.add_task(task, total=total, completed=done)
            bars.update(tasks[task], completed=done, description=f"{task}, {note}" if note else None)

        yield report


if __name__ == "__main__":
    raise SystemExit(main())
