"""The method's head on an NVIDIA GPU: Triton kernels against the reference, eager and under ``torch.compile``.

``python benchmarks/kernels.py``: checks every case against float64, then times forward + backward of the head
(transport, gate, loss), called one by one and replayed from a CUDA graph, and the whole local step; measures the peak
of extra memory; and compares with the floor: what must be read, and multiplied, at the rates that this GPU
reaches in a plain copy and a plain matrix product. Under eight minutes: torch.compile of cases that would start
after --budget seconds is left out, and said so. Without a GPU, ``benchmarks/kernel_resources.py`` compiles them all.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from clip_shapes import random_clip
from record import Row, append_record, print_rows
from torch import Tensor
from torch.nn.functional import normalize

from fedmpt.kernels import reference

N, M, D, RANK = 5, 197, 512, 32
TRANSPORT: dict[str, Any] = {"logit_scale": 100.0, "tau": 4.0, "reg": 0.2, "iterations": 10}
LOSS: dict[str, Any] = {"gamma_pos": 1.0, "gamma_neg": 2.0, "clip": 0.05}
TOLERANCE = 5e-3  # of each result's largest entry, for float16 tokens
# What is to be reached on an H100.
FASTER_THAN_EAGER, FASTER_THAN_COMPILED, LESS_MEMORY, SHARE_OF_FLOOR, STEP_SECONDS = (
    10.0,
    3.0,
    10.0,
    1 / 3,
    5e-3,
)

Head = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """One set of sizes; tokens are float16, as cached."""

    images: int
    labels: int
    pooling: str = "transport"
    adapters: bool = False

    @property
    def parameters(self) -> dict[str, Any]:
        return {"B": self.images, "C": self.labels, "pooling": self.pooling, "adapters": self.adapters}


CASES = [Case(b, c) for b in (32, 256) for c in (20, 80, 128)]
CASES += [Case(32, 20, pooling="softmax"), Case(32, 20, pooling="max"), Case(32, 20, adapters=True)]


def make_inputs(case: Case, device: str = "cuda") -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What is trained or comes from the tower (gradients wanted), and what is cached.

    The same on every device, and text features without a rounding error of their own in float16: otherwise the best
    patch could be another one than in float64.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    common = normal(D)
    trained = {
        "text": normalize(common + normal(N, case.labels, D), dim=-1).half().float(),
        "gate": normal(case.images, N).softmax(1),
        "scale": torch.tensor(20.0),
        "bias": torch.tensor(-4.0),
    }
    if case.adapters:
        trained |= {"down": normal(N, RANK, D) / D**0.5, "up": 0.1 * normal(N, D, RANK)}
    cached = {
        "tokens": normalize(common + normal(case.images, M, D), dim=-1).half(),
        "labels": torch.randint(-1, 2, (case.images, case.labels), generator=generator).to(torch.int8),
    }
    return (
        {name: value.to(device).requires_grad_() for name, value in trained.items()},
        {name: value.to(device) for name, value in cached.items()},
    )


def head_of(module: Any, loss_module: Any, case: Case) -> Head:
    """Tokens and features to the loss, with one implementation's operations."""

    def head(trained: Mapping[str, Tensor], cached: Mapping[str, Tensor]) -> Tensor:
        adapters = (trained["down"], trained["up"]) if case.adapters else None
        psi = module.region_transport(
            cached["tokens"], trained["text"], adapters=adapters, pooling=case.pooling, **TRANSPORT
        )
        scalars = trained["scale"], trained["bias"]
        loss: Tensor = loss_module.gated_asymmetric_loss(
            psi, trained["gate"], *scalars, cached["labels"], **LOSS
        )
        return loss

    return head


def run(head: Head, trained: Mapping[str, Tensor], cached: Mapping[str, Tensor]) -> list[Tensor]:
    """Loss and every gradient."""
    loss = head(trained, cached)
    return [loss.detach(), *torch.autograd.grad(loss, list(trained.values()))]


def check(head: Head, exact: Head, trained: Mapping[str, Tensor], cached: Mapping[str, Tensor]) -> float:
    """The largest error against float64, as a share of each result's largest entry.

    Raises:
        RuntimeError: it is above the tolerance.
    """
    doubles = {name: value.detach().double().requires_grad_() for name, value in trained.items()}
    expected = run(exact, doubles, cached | {"tokens": cached["tokens"].double()})
    found = run(head, trained, cached)
    names = ["loss", *trained]
    errors = {
        name: float((a.double() - b).abs().max() / b.abs().max())
        for name, a, b in zip(names, found, expected, strict=True)
    }
    if not max(errors.values()) <= TOLERANCE:
        raise RuntimeError(f"the kernels differ from float64 beyond {TOLERANCE}: {errors}")
    return max(errors.values())


def seconds(work: Callable[[], object], least: float = 0.3) -> list[float]:
    """Seconds of each call, by CUDA events, for at least 20 calls and about ``least`` seconds."""
    for _ in range(3):
        work()
    torch.cuda.synchronize()
    samples: list[float] = []
    while len(samples) < 20 or (sum(samples) < least and len(samples) < 200):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end) / 1e3)
    return samples


def captured(work: Callable[[], object]) -> Callable[[], None]:
    """The same work as a CUDA graph: no launch costs, neither Python's nor the driver's."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def peak_bytes(work: Callable[[], object]) -> int:
    """Most memory held during the work beyond what was held before."""
    work()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def shares(work: Callable[[], object], repeats: int = 10) -> str:
    """Where the GPU's time goes: the share of each kernel, the largest first."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(repeats):
            work()
        torch.cuda.synchronize()
    spent = {
        event.key: event.self_device_time_total
        for event in profile.key_averages()
        if event.device_type == torch.autograd.DeviceType.CUDA
    }
    longest = sorted(spent.items(), key=lambda item: -item[1])[:6]
    return ", ".join(f"{name[:40]} {time / sum(spent.values()):.0%}" for name, time in longest)


def measure_floor() -> dict[str, float]:
    """Copy in bytes/s (read plus written) and float16 products in FLOP/s."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.float16)
    copy = statistics.median(seconds(lambda: target.copy_(source)))
    product = statistics.median(seconds(lambda: a @ a))
    return {"copy_bytes": 2 * source.numel() / copy, "matmul_flops": 2 * 8192**3 / product}


def floor_seconds(case: Case, floor: Mapping[str, float]) -> float:
    """The larger of: reading the tokens once each way; one product of [B·M, D] with [D, N·C] each way.

    Every pooling needs the same; adapters add a product with [D, 2·N·r] each way.
    """
    tokens = case.images * M * D
    columns = N * (case.labels + (2 * RANK if case.adapters else 0))
    return max(2 * 2 * tokens / floor["copy_bytes"], 2 * 2 * tokens * columns / floor["matmul_flops"])


def measure_head(case: Case, floor: Mapping[str, float], compile_it: bool) -> tuple[list[Row], str]:
    """Rows of one case, and what holds its time."""
    from fedmpt.kernels import triton_asymmetric_loss, triton_region_transport

    trained, cached = make_inputs(case)
    plain = head_of(reference, reference, case)
    heads = {"eager": plain, "triton": head_of(triton_region_transport, triton_asymmetric_loss, case)}
    error = check(heads["triton"], plain, trained, cached)
    print(f"{case}: largest error {error:.1e} of the largest entry", flush=True)
    if compile_it:
        torch.compiler.reset()
        heads["torch.compile"] = torch.compile(plain, dynamic=False)
    work = {name: lambda head=head: run(head, trained, cached) for name, head in heads.items()}
    held = f"{case}: {shares(work['triton'])}"
    print(held, flush=True)
    memory = {name: peak_bytes(item) for name, item in work.items()}
    direct = {name: seconds(item) for name, item in work.items()}
    replayed = {name: seconds(captured(item)) for name, item in work.items()}
    least = floor_seconds(case, floor)
    rows = [
        *compare("head, call by call", "s", direct, case, least),
        *compare("head, replayed", "s", replayed, case, least),
        *compare(
            "extra memory", "bytes", {name: [float(value)] for name, value in memory.items()}, case, None
        ),
    ]
    return rows, held


def compare(
    what: str, unit: str, samples: Mapping[str, list[float]], case: Case, floor: float | None
) -> list[Row]:
    """One row for each implementation, against the kernels."""
    best = statistics.median(samples["triton"])
    return [
        Row(
            f"{what}: {name}",
            unit,
            values,
            case.parameters,
            against="" if name == "triton" else "triton",
            ratio=None if name == "triton" else best / statistics.median(values),
            floor=floor,
        )
        for name, values in samples.items()
    ]


def measure_step() -> list[Row]:
    """The torch engine's whole local step: ViT-B/16's text tower, 20 labels, batch 32, copies included."""
    from fedmpt.edge_client.torch_engine import CapturedStep, place_weights
    from fedmpt.export import methods
    from fedmpt.export.frozen import freeze
    from fedmpt.export.presets import PAPER_POOLING, PAPER_TRAINING
    from fedmpt.protocol.manifest import Tokens

    device = torch.device("cuda")
    labels = [f"label {number}" for number in range(20)]
    conditions = ["spatial layout", "object pose", "background", "lighting and weather", "object scale"]
    random = np.random.default_rng(0)
    batch = random.standard_normal((32, M, D), np.float32).astype(np.float16) / np.float16(D**0.5)
    known = random.integers(-1, 2, (32, 20)).astype(np.int8)
    rows = []
    for method in ("fedmpt-prompts", "fedmpt-full"):
        setup, weights = freeze(
            random_clip(),
            labels,
            conditions,
            method,
            PAPER_POOLING,
            condition_context=4,
            class_context=4,
            adapter_rank=RANK,
        )
        training = dataclasses.replace(PAPER_TRAINING, batch_size=32)
        tokens = Tokens("clearclip", "full", M, (14, 14), D)
        step = CapturedStep(setup, training, tokens, place_weights(weights, device, half=True), device)
        state = {name: value.numpy() for name, value in methods.initial_state(setup, 0).items()}
        samples = seconds(lambda step=step, state=state: step.run(state, step.load(batch, known)))
        rows.append(Row("local step", "s", samples, {"B": 32, "C": 20, "method": method}))
    return rows


def verdicts(rows: list[Row]) -> list[str]:
    """Each aim beside the worst case that was measured."""

    def against(name: str) -> list[float]:
        return [1 / row.ratio for row in rows if row.ratio and row.name == name]

    measured = {
        f"times {how} {than}, aim {aim}": (against(f"{what}: {than}"), aim)
        for what, how, than, aim in (
            ("head, call by call", "faster, call by call, than", "eager", FASTER_THAN_EAGER),
            ("head, replayed", "faster, replayed, than", "eager", FASTER_THAN_EAGER),
            ("head, call by call", "faster, call by call, than", "torch.compile", FASTER_THAN_COMPILED),
            ("head, replayed", "faster, replayed, than", "torch.compile", FASTER_THAN_COMPILED),
            ("extra memory", "less memory than", "eager", LESS_MEMORY),
        )
    } | {
        f"of the floor, aim {SHARE_OF_FLOOR:.2f}": (
            [row.floor / row.median for row in rows if row.name == "head, replayed: triton" and row.floor],
            SHARE_OF_FLOOR,
        ),
        f"local steps in {STEP_SECONDS} s, aim 1": (
            [STEP_SECONDS / row.median for row in rows if row.name == "local step"],
            1.0,
        ),
    }
    lines = []
    for what, (values, aim) in measured.items():
        worst = min(values, default=None)
        if worst is None:
            lines.append(f"{what}: not measured")
        else:
            lines.append(f"{worst:.2f} {what}: {'reached' if worst >= aim else 'missed'}")
    return lines


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--budget", type=float, default=300, help="start no compilation after so many seconds"
    )
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(
            f"benchmarks/kernels.py needs an NVIDIA GPU and a CUDA build of PyTorch; this one "
            f"({torch.__version__}) sees none. Without a GPU, run benchmarks/kernel_resources.py.",
            file=sys.stderr,
        )
        return 1
    started = time.monotonic()
    floor = measure_floor()
    rows: list[Row] = []
    time_held: list[str] = []
    for case in CASES:
        in_time = time.monotonic() - started < options.budget
        if not in_time:
            print(f"{case}: torch.compile left out, {options.budget:.0f} s are over", flush=True)
        measured, held = measure_head(case, floor, compile_it=in_time)
        rows += measured
        time_held.append(held)
    rows += measure_step()
    print_rows("The head, forward and backward, and the local step", rows)
    lines = verdicts(rows)
    print("\n".join(lines))
    properties = torch.cuda.get_device_properties(0)
    notes = {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory": properties.total_memory,
        "cuda": torch.version.cuda,
        "verdicts": lines,
        "time held by": time_held,
    }
    path = append_record("kernels", rows, notes=json.dumps(notes), floor=floor)
    print(f"recorded in {path}; {time.monotonic() - started:.0f} s in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
