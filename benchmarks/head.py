"""The head over the number of image tokens: all that tagger and local step compute of a photo besides the towers.

``python benchmarks/head.py``: 50, 197 and 577 tokens (as ViT-B/32, ViT-B/16 and ViT-L/14 at 336 pixels have them), 20
labels, 5 conditions, width 512, transport, random unit tokens. ``onnx`` is the graph in ONNX Runtime, opened as
the edge opens it; ``eager`` the PyTorch code that it is traced from. Both give the same, which is checked. A
sample is the mean of several calls, after a rest: the other's worker threads spin for a while when it has ended.

- scores: ``head.onnx``, as the tagger has it;
- gradients: the head's part of ``train_step.onnx``, forward and backward to text features, κ and δ.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from clip_shapes import random_clip
from local_step import check_equal
from onnx import ModelProto
from record import Row, append_record, floor_again, interleave, machine_floor, print_rows, repeated
from torch import Tensor

from fedmpt.edge_client.onnx_session import open_session
from fedmpt.export import graphs, methods, programs
from fedmpt.export.conditions import DEFAULT_CONDITIONS
from fedmpt.export.frozen import freeze
from fedmpt.export.presets import PAPER

LABELS = [f"label {number}" for number in range(20)]
WIDTH = 512
TRAINED = ("text", "scale", "bias")
PHOTOS = {"scores": 8, "gradients": 32}
CALLS = 10  # in one sample
REST = 0.2  # seconds
PRODUCTS = [(1576, WIDTH, 100), (18464, WIDTH, 100), (1024, 1024, 1024)]

Outputs = dict[str, Tensor]


def main() -> None:
    """Measure, print, record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[50, 197, 577], help="%(default)s")
    parser.add_argument("--repeats", type=int, default=15, help="%(default)s")
    arguments = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    floor = machine_floor(PRODUCTS)
    rows = [
        row
        for tokens in arguments.tokens
        for row in measure(tokens, arguments.repeats, floor["matmul_flops"])
    ]
    rows, floor = floor_again(rows, floor, PRODUCTS)
    print_rows("The head", rows)
    append_record("head", rows, floor=floor)


def measure(tokens: int, repeats: int, flops_per_second: float) -> list[Row]:
    """Scores and gradients for one number of tokens."""
    setup, weights = freeze(
        random_clip(layers=1, vocabulary=512),
        LABELS,
        DEFAULT_CONDITIONS,
        "fedmpt-prompts",
        PAPER.pooling,
        condition_context=4,
        class_context=4,
        adapter_rank=32,
    )
    state = methods.initial_state(setup, 0)
    with torch.no_grad():
        text = methods.text_features(setup, weights, state)

    def gradients(inputs: Outputs) -> Outputs:
        leaves = {name: inputs[name].detach().requires_grad_() for name in TRAINED}
        with torch.enable_grad():
            loss = methods.head_loss(
                setup, PAPER.training, leaves["text"], leaves, inputs["tokens"], inputs["labels"]
            )
            found = torch.autograd.grad(loss, list(leaves.values()))
        return {
            "loss": loss.detach(),
            **dict(zip((f"gradient.{name}" for name in leaves), found, strict=True)),
        }

    def scores(inputs: Outputs) -> Outputs:
        with torch.no_grad():
            return programs.run_head(setup, inputs, inputs["tokens"], inputs["text"])

    shared = {"text": text, "scale": state["scale"], "bias": state["bias"]}
    batches = {what: programs.example_batch(setup, tokens, photos) for what, photos in PHOTOS.items()}
    feeds = {
        "scores": {"tokens": batches["scores"]["tokens"], **shared},
        "gradients": {**batches["gradients"], **shared},
    }
    graph = {
        "scores": programs.trace_head(setup, weights, state, tokens),
        "gradients": graphs.trace_step(lambda _, inputs: gradients(inputs), {}, feeds["gradients"]),
    }
    rows = []
    for what, function in (("scores", scores), ("gradients", gradients)):
        feed = feeds[what]
        ways: dict[str, Callable[[], Any]] = {
            "eager": lambda function=function, feed=feed: function(feed),
            "onnx": in_onnx(graph[what], feed, plan_memory=what == "scores"),
        }
        check_equal({name: way() for name, way in ways.items()})
        passes = 1 if what == "scores" else 2
        flops = 2.0 * passes * PHOTOS[what] * (tokens - 1) * WIDTH * len(DEFAULT_CONDITIONS) * len(LABELS)
        parameters = {"tokens": tokens, "photos": PHOTOS[what], "labels": len(LABELS)}
        samples_of = {name: repeated(way, CALLS) for name, way in ways.items()}
        seconds = interleave(samples_of, repeats, warmup=2, before=lambda name: time.sleep(REST))
        eager, onnx = (
            Row(
                f"{what}: {name}",
                "s",
                [sample / CALLS for sample in samples],
                parameters,
                floor=flops / flops_per_second,
            )
            for name, samples in seconds.items()
        )
        rows += [eager, onnx.compared_with(eager)]
    return rows


def in_onnx(model: ModelProto, feed: Outputs, plan_memory: bool) -> Callable[[], Outputs]:
    """The graph in ONNX Runtime."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "graph.onnx"
        path.write_bytes(model.SerializeToString())
        session = open_session(path, "cpu", plan_memory=plan_memory)
    names = [item.name for item in session.get_outputs()]
    wanted = {item.name for item in session.get_inputs()}
    values = {name: value.numpy() for name, value in feed.items() if name in wanted}
    return lambda: {
        name: torch.as_tensor(value) for name, value in zip(names, session.run(names, values), strict=True)
    }


if __name__ == "__main__":
    main()
