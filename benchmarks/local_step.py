"""One local training step: ``train_step.onnx`` on cached features against the plain way, and what lies between.

``python benchmarks/local_step.py``: ViT-B/16's shapes, random weights, 5 conditions, batch 32, all cores that may
be used. Every case computes the same loss and the same gradients, which is checked before anything is timed:

- plain: `transformers`' CLIP in eager PyTorch; the photos go through the vision tower in every step, every prompt
  through the text tower as 77 tokens of its own;
- caching alone: image tokens cached, prompts of 77 tokens;
- prefix sharing alone: photos encoded in the step, prompts prefix-shared;
- eager: both, in PyTorch;
- onnx: both, ``train_step.onnx`` in ONNX Runtime, as an edge site runs it.

Memory is that of a process of its own that opens the graph with the edge's engine and takes steps.

Memory needed: about 16 GB for the 77-token cases at 80 labels, 14 GB for 1,000, 9 GB for 365; with less, leave sizes
out with --labels and --plain-up-to. From 500 labels on, the session is closed while eager PyTorch runs, and both are
warmed up before each turn, outside the clock: together they would need 24 GB.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import Row, append_record, floor_again, interleave, machine_floor, print_rows
from torch import Tensor
from torch.nn.functional import normalize
from transformers import CLIPConfig, CLIPModel

from fedmpt.edge_client.onnx_session import open_session
from fedmpt.export import graphs, methods, programs
from fedmpt.export.clip import CLIP_MEAN, CLIP_STD, ClipCheckpoint, checkpoint_of
from fedmpt.export.conditions import DEFAULT_CONDITIONS
from fedmpt.export.frozen import TEXT_WEIGHTS, freeze, save_frozen
from fedmpt.export.methods import Setup
from fedmpt.export.presets import PAPER

VOC = [
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("dining table", "dog", "horse", "motorbike", "person", "potted plant", "sheep", "sofa", "train"),
    "tv monitor",
]
# (rows, inner, columns) of the text tower's products, for few labels and for many.
TEXT_PRODUCTS = [
    *((rows, 512, 2048) for rows in (512, 2048)),
    *((rows, 2048, 512) for rows in (512, 2048)),
    (1024, 1024, 1024),
]
CLOSE_FROM = 500  # labels


def main() -> None:
    """Measure, print, record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--labels", type=int, nargs="+", default=[20, 80, 365, 1000], help="%(default)s")
    parser.add_argument(
        "--plain-up-to", type=int, default=80, help="most labels for the 77-token cases (%(default)s)"
    )
    parser.add_argument("--conditions", type=int, default=5, help="%(default)s")
    parser.add_argument("--layers", type=int, default=12, help="of both towers (%(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="%(default)s")
    arguments = parser.parse_args()
    floor = machine_floor(TEXT_PRODUCTS)
    rows: list[Row] = []
    killed = []
    for count in arguments.labels:
        sizes = count, arguments.conditions, arguments.layers, arguments.repeats
        # In a process of its own: what one size leaves behind is what the next one lacks.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            try:
                rows += pool.submit(
                    measure, *sizes, count <= arguments.plain_up_to, floor["matmul_flops"]
                ).result()
            except BrokenProcessPool:
                killed.append(f"{count} labels: killed, probably for want of memory; left out")
                continue
        print_rows(f"{count} labels", [row for row in rows if row.parameters["labels"] == count])
    rows, floor = floor_again(rows, floor, TEXT_PRODUCTS)
    append_record("local_step", rows, floor=floor, notes="\n".join(killed))
    if killed:
        raise SystemExit("\n".join(killed))


def measure(
    labels: int, conditions: int, layers: int, repeats: int, plain: bool, flops_per_second: float
) -> list[Row]:
    """All cases for one number of labels."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    case = Case.make(labels, conditions, layers)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        started = time.perf_counter()
        case.export(folder)
        exported = time.perf_counter() - started
        step = OnnxStep(case, folder)
        cases: dict[str, Callable[[], dict[str, Tensor]]] = {}
        if plain:
            cases |= {
                "plain": lambda: case.eager(shared=False, cached=False),
                "caching alone": lambda: case.eager(shared=False, cached=True),
                "prefix sharing alone": lambda: case.eager(shared=True, cached=False),
            }
        cases |= {
            "eager": lambda: case.eager(shared=True, cached=True),
            "onnx": step,
        }

        def before(name: str) -> None:
            """Where both do not fit, close the session for the others' turns; warm up after each change."""
            if name == "onnx" and step.session is None:
                step.open()
                step()
            elif name != "onnx" and step.session is not None and labels >= CLOSE_FROM:
                step.close()
                cases[name]()

        outputs = {}
        for name, run in cases.items():
            before(name)
            outputs[name] = run()
        check_equal(outputs)
        seconds = interleave(cases, repeats, warmup=1, before=before)
        step.close()  # the process below needs the memory
        command = [sys.executable, str(Path(__file__).with_name("step_memory.py")), str(folder)]
        memory = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        size = sum(path.stat().st_size for path in folder.iterdir())
    parameters = {"labels": labels, "conditions": conditions, "layers": layers, "batch": 32}
    floor = (case.text_flops() + case.head_flops()) / flops_per_second
    found = {name: Row(name, "s", samples, parameters, floor=floor) for name, samples in seconds.items()}
    first, *others = found.values()
    rows = [first, *(row.compared_with(first) for row in others)]
    if plain:
        rows.append(found["onnx"].compared_with(found["eager"]))
    rows.append(Row("onnx: peak anonymous memory", "MB", [float(memory)], parameters))
    rows.append(Row("export of the step", "s to export", [exported], parameters))
    rows.append(Row("size of graph and weights", "MB of files", [size / 1e6], parameters))
    return rows


@dataclasses.dataclass(frozen=True)
class Case:
    """One size: the checkpoint in both forms, the set-up, and a batch."""

    model: CLIPModel
    clip: ClipCheckpoint
    setup: Setup
    weights: dict[str, Tensor]
    state: dict[str, Tensor]
    pixels: Tensor
    tokens: Tensor
    labels: Tensor

    @staticmethod
    def make(labels: int, conditions: int, layers: int, photos: int = 32) -> Case:
        """Random weights of ViT-B/16's shapes; labels of one to three words, as tokenizers cut them."""
        torch.manual_seed(0)
        config = CLIPConfig(
            text_config={"num_hidden_layers": layers, "eos_token_id": 49407, "bos_token_id": 49406},
            vision_config={"num_hidden_layers": layers, "patch_size": 16},
            projection_dim=512,
        )
        model = CLIPModel(config).eval().requires_grad_(False)
        clip = checkpoint_of(
            model, StandInTokenizer(), name="random", licence="none", mean=CLIP_MEAN, std=CLIP_STD
        )
        names = VOC[:labels] + [
            f"label{number} {'x ' * (number % 3)}".strip() for number in range(20, labels)
        ]
        phrases = [*DEFAULT_CONDITIONS, *(f"condition {number}" for number in range(5, conditions))][
            :conditions
        ]
        setup, weights = freeze(
            clip,
            names,
            phrases,
            "fedmpt-prompts",
            PAPER.pooling,
            condition_context=4,
            class_context=4,
            adapter_rank=32,
        )
        weights = {name: value.contiguous() for name, value in weights.items()}
        generator = torch.Generator().manual_seed(1)
        pixels = torch.randint(0, 256, (photos, 224, 224, 3), generator=generator).to(torch.uint8)
        truth = torch.randint(0, 2, (photos, labels), generator=generator).to(torch.int8)
        with torch.no_grad():
            tokens = programs.run_image_encoder(clip, clip.vision, pixels, "plain", "full")
        state = methods.initial_state(setup, 0)
        return Case(model, clip, setup, weights, state, pixels, tokens, truth)

    def eager(self, *, shared: bool, cached: bool) -> dict[str, Tensor]:
        """Loss and gradients in PyTorch."""
        leaves = {name: value.detach().requires_grad_() for name, value in self.state.items()}
        tokens = self.tokens if cached else self.encode()
        text = (
            methods.text_features(self.setup, self.weights, leaves) if shared else self.whole_prompts(leaves)
        )
        loss = methods.head_loss(self.setup, PAPER.training, text, leaves, tokens, self.labels)
        gradients = torch.autograd.grad(loss, list(leaves.values()))
        named = zip(leaves, gradients, strict=True)
        return {"loss": loss.detach()} | {f"gradient.{name}": value for name, value in named}

    @torch.no_grad()
    def encode(self) -> Tensor:
        """The photos' tokens, by ``transformers``."""
        scaled = (self.pixels.float() / 255 - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD)
        vision = self.model.vision_model
        hidden = vision(scaled.permute(0, 3, 1, 2)).last_hidden_state
        return normalize(self.model.visual_projection(vision.post_layernorm(hidden)), dim=-1)

    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return 1 + max(self.setup.phrases) + 8 + max(self.setup.labels)

    def whole_prompts(self, state: dict[str, Tensor], length: int = 77) -> Tensor:
        """Text features of all N × C prompts, each of ``length`` tokens, by ``transformers``."""
        setup, words = self.setup, list(self.weights["words.phrases"].split(self.setup.phrases))
        suffixes = self.weights["words.labels"].split(setup.labels)
        rows, ids = [], []
        for context, phrase in zip(state["condition_context"], words, strict=True):
            for suffix in suffixes:
                parts = [self.weights["words.start"], context, phrase, state["class_context"], suffix]
                used = sum(map(len, parts))
                rows.append(torch.cat([*parts, suffix[-1:].expand(length - used, -1)]))
                ids.append([0] * (used - 1) + [49407] * (length + 1 - used))
        embedded = torch.stack(rows)
        embedding = self.model.text_model.embeddings.token_embedding
        hook = embedding.register_forward_hook(lambda module, given, output: embedded)
        pooled = self.model.text_model(input_ids=torch.tensor(ids)).pooler_output
        hook.remove()
        return normalize(self.model.text_projection(pooled), dim=-1).unflatten(0, (len(words), len(suffixes)))

    def export(self, folder: Path) -> None:
        """``train_step.onnx`` and its weights, as a bundle has them."""
        save_frozen(folder, self.setup, self.weights)
        count = self.tokens.shape[1]
        model = programs.trace_train_step(self.setup, PAPER.training, self.weights, self.state, count)
        graphs.place_weights(model, self.weights, folder / TEXT_WEIGHTS)
        (folder / "train_step.onnx").write_bytes(model.SerializeToString(deterministic=True))

    def text_flops(self) -> float:
        """The least operations of the text tower, forward and backward to the contexts: its products with weights.

        Left out are attention; [SOS], the same in every step; what only [EOT] needs of the last block, for the other
        rows; and the first block's gradients of words that are not trained.
        """
        setup = self.setup
        conditions, labels = len(setup.phrases), len(setup.labels)
        trained = conditions * (setup.condition_context + setup.class_context)
        rows = sum(setup.phrases) + trained + conditions * sum(setup.labels)
        ends = conditions * labels
        square = setup.text_width**2
        forward = (12 * rows * (setup.spec.layers - 1) + 2 * rows + 10 * ends) * square
        backward = forward - 3 * (rows - trained) * square
        return 2.0 * (forward + backward + 2 * ends * setup.text_width * setup.width)

    def head_flops(self) -> float:
        """The least operations of the head: patches times text features, and their gradient to the text."""
        images, tokens, width = self.tokens.shape
        return 2.0 * 2 * images * (tokens - 1) * width * len(self.setup.phrases) * len(self.setup.labels)


class OnnxStep:
    """The step in ONNX Runtime, opened as the edge opens it."""

    def __init__(self, case: Case, folder: Path) -> None:
        self.path = folder / "train_step.onnx"
        inputs = {**case.state, "tokens": case.tokens, "labels": case.labels}
        self.feed = {name: value.numpy() for name, value in inputs.items()}
        self.session: Any = None

    def open(self) -> None:
        self.session = open_session(self.path, "cpu", files=(TEXT_WEIGHTS,), plan_memory=False)

    def close(self) -> None:
        """Give the session's memory back."""
        self.session = None
        gc.collect()

    def __call__(self) -> dict[str, Tensor]:
        names = [item.name for item in self.session.get_outputs()]
        values = self.session.run(names, self.feed)
        # Copies: an output that lives on would keep the whole memory of a session that was closed.
        return {name: torch.from_numpy(np.array(value)) for name, value in zip(names, values, strict=True)}


class StandInTokenizer:
    """One to three tokens a word: what a vocabulary does to rare words; the ids themselves do not matter."""

    bos_token_id, eos_token_id = 49406, 49407

    def __call__(self, words: str, add_special_tokens: bool) -> Any:
        pieces = words.replace(".", " .").split()
        ids = [1000 + sum(map(ord, piece)) % 40000 for piece in pieces for _ in range(1 + len(piece) // 9)]
        return dataclasses.make_dataclass("Encoding", ["input_ids"])(ids)


def check_equal(outputs: dict[str, dict[str, Tensor]], reference: str = "eager") -> None:
    """All cases give the same outputs as the reference case."""
    expected = outputs[reference]
    for case, found in outputs.items():
        for name, value in found.items():
            difference = (value - expected[name]).abs().max() / expected[name].abs().max()
            if difference > 1e-3:
                raise SystemExit(f"{case}: {name} differs by {difference:.1e}")


if __name__ == "__main__":
    main()
