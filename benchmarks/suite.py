"""The list of all benchmarks: what each compares, what its plots run over, what a machine needs for it."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Sequence
from dataclasses import dataclass

SEARCH_PATH = "/usr/local/sbin:/usr/sbin:/usr/local/bin:/usr/bin:/bin"


@dataclass(frozen=True)
class Benchmark:
    """``benchmarks/<name>.py`` and its records ``results/<name>.jsonl``.

    ``grows`` are the parameters (of rows) over which curves are drawn. It needs all ``packages`` and
    ``commands``, and an NVIDIA GPU where ``gpu`` says so; without the ``optional`` packages it leaves cases out.
    """

    name: str
    title: str
    compares: str
    grows: tuple[str, ...] = ()
    packages: tuple[str, ...] = ("onnxruntime", "torch")
    commands: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    gpu: bool = False


SUITE = (
    Benchmark(
        "local_step",
        "The local training step",
        "One step, forward and backward: `train_step.onnx` on cached features as a site runs it (onnx) and the same in "
        "eager PyTorch (eager), against `transformers` in eager PyTorch that encodes the photos in every step and runs "
        "every prompt as 77 tokens (plain); and each of the two savings alone.",
        grows=("labels",),
    ),
    Benchmark(
        "prefix_sharing",
        "Prefix sharing in the text tower",
        "Text features and their gradients: prompts that share their condition's prefix, against every prompt on its "
        "own, cut at its end and padded to 77 tokens.",
        grows=("labels", "conditions"),
    ),
    Benchmark(
        "feature_caching",
        "Feature caching",
        "From JPEG files to a feature cache on disk, against ONNX Runtime alone on tensors that are ready in memory.",
    ),
    Benchmark(
        "head",
        "The head, over image tokens",
        "All that is computed of a photo besides the towers: scores as the tagger computes them, and the head's part "
        "of the local step, forward and backward; the exported graphs in ONNX Runtime (onnx) against the PyTorch code "
        "that they are traced from (eager).",
        grows=("tokens",),
    ),
    Benchmark(
        "tagging",
        "Tagging photos",
        "`tagger.onnx` from JPEG files to labels, against the image encoder alone in ONNX Runtime and against "
        "zero-shot tagging in a loop with `transformers`. Batches of 8 photos where all cores share one, of 2 where "
        "each core has its own, as `fedmpt tag` has it.",
        packages=("onnxruntime", "torch", "transformers"),
    ),
    Benchmark(
        "aggregation",
        "Durable aggregation",
        "Updates accepted a second, each checked, stored durably and answered with a receipt, against a bare MQTT "
        "subscriber that only counts: while they are published (layout live), and when all wait at the broker (layout "
        "waiting). And the average itself against Flower's, of the same updates in memory, both weighted by samples.",
        grows=("clients",),
        packages=(),
        commands=("mosquitto",),
        optional=("flwr",),
    ),
    Benchmark(
        "footprint",
        "A client's footprint",
        "Disk, import time, memory and bytes of a site's client in a fresh environment with the `cpu` extra.",
    ),
    Benchmark(
        "demo",
        "The demo",
        "`fedmpt demo` as a whole: time, memory of all its processes together, and what the federation achieves on "
        "pictures that no site has; one sample a seed.",
        packages=("onnxruntime", "psutil"),
    ),
    Benchmark(
        "codec",
        "Bytes on the wire",
        "Updates and states as the protocol encodes them, against the same tensors as a pickled PyTorch state dict.",
        grows=("values",),
        packages=("torch",),
    ),
    Benchmark(
        "simulator",
        "Simulation",
        "What a simulated client and round cost as federations grow, with the demo's bundle and 5 % of the clients in "
        "each round; pictures of scenes drawn a second by one process. Nothing is compared: the growth is the result.",
        grows=("clients",),
        packages=("onnxruntime",),
    ),
    Benchmark(
        "instructions",
        "Instructions",
        "Machine instructions of one call, as callgrind counts them; no comparison, but a guard that a busy machine "
        "does not disturb.",
        packages=(),
        commands=("valgrind",),
    ),
    Benchmark(
        "kernels",
        "Kernels",
        "The head's Triton kernels against the plain PyTorch reference, eager and compiled; B photos, C labels.",
        grows=("C",),
        packages=("torch", "triton"),
        gpu=True,
    ),
    Benchmark(
        "kernel_resources",
        "Kernels on the chip",
        "What the Triton kernels need of compute capability 8.0, 8.7 (Jetson Orin) and 9.0, as ptxas tells without a "
        "GPU: the most that any configuration that can be chosen takes of registers, shared memory and spills.",
        packages=("torch", "triton"),
    ),
)


def missing(benchmark: Benchmark) -> list[str]:
    """What this machine lacks to run a benchmark, in words; empty if it can."""
    lacks = [f"Python package {name}" for name in absent(benchmark.packages)]
    lacks += [f"command {name}" for name in benchmark.commands if not shutil.which(name, path=SEARCH_PATH)]
    if benchmark.gpu and not lacks and not has_gpu():
        lacks.append("NVIDIA GPU")
    return lacks


def absent(packages: Sequence[str]) -> list[str]:
    """Those packages that are not installed."""
    return [name for name in packages if importlib.util.find_spec(name) is None]


def has_gpu() -> bool:
    """Whether PyTorch sees a CUDA device."""
    import torch

    return torch.cuda.is_available()
