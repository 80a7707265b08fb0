"""Compile the Triton kernels to machine code without a GPU, and report what each needs of the chip.

    python benchmarks/kernel_resources.py                                  # everything, and a record; takes long
    python benchmarks/kernel_resources.py --dtype float16                  # of one dtype
    python benchmarks/kernel_resources.py --dtype float16 --capability 90  # a part of it, and no record

Shared memory comes from Triton's metadata, registers and spills from ptxas. ``TRITON_INTERPRET`` must be unset.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import hashlib
import inspect
import io
import itertools
import json
import multiprocessing
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any

import triton
from record import Row, append_record, print_rows
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fedmpt.kernels import triton_asymmetric_loss as loss
from fedmpt.kernels import triton_region_backward as backward
from fedmpt.kernels import triton_region_blocks as blocks
from fedmpt.kernels import triton_region_forward as forward
from fedmpt.kernels import triton_region_tiles as tiles
from fedmpt.kernels.triton_region_backward import label_gradient_kernel, patch_gradient_kernel, plan_kernel
from fedmpt.kernels.triton_region_forward import blocked_kernel, plane_kernel
from fedmpt.kernels.triton_region_transport import POOLING_CODES, plane_constants

CAPABILITIES = (80, 87, 90)  # A100, Jetson Orin, H100
SHARED_MEMORY = {80: 163 * 1024, 87: 163 * 1024, 90: 227 * 1024}  # bytes that one block may have
REGISTERS_A_THREAD, REGISTERS_A_BLOCK = 255, 65536

TRITON_DTYPES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}
ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4}


@dataclass(frozen=True)
class Build:
    """One kernel with one choice of everything that is fixed at compile time."""

    kernel: str
    dtype: str
    warps: int
    stages: int
    constants: tuple[tuple[str, Any], ...]
    capability: int = 80
    most_registers: int | None = None  # None: ptxas chooses


@dataclass(frozen=True)
class Resources:
    """What ptxas and Triton say of a build: bytes of shared memory and of spills, registers a thread."""

    build: Build
    shared: int
    registers: int
    spills: int

    @property
    def fits(self) -> bool:
        """Whether the build's chip can run it, and without spills."""
        return (
            self.spills == 0
            and self.shared <= SHARED_MEMORY[self.build.capability]
            and 0 < self.registers <= REGISTERS_A_THREAD
            and self.registers * 32 * self.build.warps <= REGISTERS_A_BLOCK
        )


KERNELS = {
    kernel.__name__: kernel
    for kernel in (
        plane_kernel,
        blocked_kernel,
        plan_kernel,
        label_gradient_kernel,
        patch_gradient_kernel,
        loss.loss_kernel,
        loss.mean_kernel,
        loss.loss_gradient_kernel,
    )
}


def build(kernel: str, dtype: str, tile: tiles.Tile, pooling: str, adapted: bool, **constants: Any) -> Build:
    """A kernel as ``triton_region_transport`` launches it."""
    shared = {
        "POOLING": POOLING_CODES[pooling],
        "ADAPTED": adapted,
        "BLOCK_M": tile.m,
        "BLOCK_C": tile.c,
        "BLOCK_D": tile.d,
    }
    items = tuple((shared | constants).items())
    return Build(kernel, dtype, tile.warps, tile.stages, items, most_registers=tile.registers)


def builds(dtypes: Iterable[str], poolings: Iterable[str], adapters: Iterable[bool]) -> Iterator[Build]:
    """Every kernel with every configuration that can be chosen for these dtypes, poolings and adapters."""
    for dtype, pooling, adapted in itertools.product(dtypes, poolings, adapters):
        itemsize = ITEMSIZE[dtype]
        for tile in tiles.PLANES[itemsize]:
            for iterates in tile.takes:
                if (iterates == "none") == (pooling != "transport"):
                    constants = plane_constants(tile, iterates)
                    yield build("plane_kernel", dtype, tile, pooling, adapted, **constants)
        for tile in tiles.BLOCKED[itemsize]:
            yield build("blocked_kernel", dtype, tile, pooling, adapted)
        ranks = tiles.RANK_BLOCKS if adapted else ()
        for tile in tiles.LABEL_GRADIENTS[itemsize]:
            yield build("plan_kernel", dtype, tile, pooling, adapted)
            for block in (tile.y, *ranks):
                yield build("label_gradient_kernel", dtype, tile, pooling, adapted, BLOCK_Y=block)
        for tile in tiles.PATCH_GRADIENTS[itemsize]:
            for block, norm in ((tile.y, False), *((rank, True) for rank in ranks)):
                constants = {"BLOCK_Y": block, "WRITE_NORM": norm}
                yield build("patch_gradient_kernel", dtype, tile, pooling, adapted, **constants)
    yield loss_build("mean_kernel", "float32", BLOCK=loss.REDUCE_BLOCK)
    for dtype, clipped, count in itertools.product(dtypes, (True, False), loss.CONDITION_BLOCKS):
        for kernel in ("loss_kernel", "loss_gradient_kernel"):
            yield loss_build(kernel, dtype, CLIPPED=clipped, **loss.blocks(count))


def loss_build(kernel: str, dtype: str, **constants: Any) -> Build:
    """A kernel as ``triton_asymmetric_loss`` launches it."""
    return Build(kernel, dtype, loss.WARPS, 3, tuple(constants.items()))


def compile_build(build: Build) -> Resources:
    """Compile for the build's capability; nothing is launched."""
    kernel = KERNELS[build.kernel]
    region_kernel = "z_ptr" in kernel.arg_names
    typed = ("z_ptr", "t_ptr", "h_ptr", "k_ptr", "y_ptr") if region_kernel else ("psi_ptr",)
    constants = dict(build.constants)
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name == "label_ptr":
            signature[name] = "*i8"
        elif name.endswith("_ptr"):
            signature[name] = "*" + (TRITON_DTYPES[build.dtype] if name in typed else "fp32")
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif name in ("scale", "inverse_reg", "gamma_pos", "gamma_neg", "clip"):
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if region_kernel and (name in ("D", "R", "Y") or "stride" in name):
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    log = io.StringIO()
    with contextlib.redirect_stdout(log), triton.knobs.nvidia.scope(), triton.knobs.compilation.scope():
        triton.knobs.nvidia.dump_ptxas_log = True
        triton.knobs.compilation.always_compile = True
        compiled = triton.compile(
            source,
            target=GPUTarget("cuda", build.capability, 32),
            options={
                "num_warps": build.warps,
                "num_stages": build.stages,
                "maxnreg": build.most_registers,
                "enable_fp_fusion": True,
            },
        )
    registers = re.search(r"Used (\d+) registers", log.getvalue())
    spills = re.findall(r"(\d+) bytes spill", log.getvalue())
    if registers is None or not spills:
        raise RuntimeError(f"{build}: ptxas reported no resources:\n{log.getvalue()}")
    return Resources(build, compiled.metadata.shared, int(registers[1]), sum(map(int, spills)))


def code_digest(dtypes: Iterable[str]) -> str:
    """Names what is compiled for these dtypes: the kernels' code, comments aside, and all configurations."""
    modules = (blocks, backward, forward, loss)
    code = [ast.unparse(ast.parse(inspect.getsource(module))) for module in modules]
    configurations = map(str, builds(dtypes, POOLING_CODES, [False, True]))
    return hashlib.sha256("\n".join((*code, *configurations)).encode()).hexdigest()[:12]


def describe(result: Resources) -> str:
    """One line of the table."""
    build = result.build
    constants = " ".join(f"{name.removeprefix('BLOCK_')}={value}" for name, value in build.constants)
    return (
        f"{build.kernel:22} sm_{build.capability} {build.dtype:8} warps {build.warps:2} stages {build.stages} "
        f"shared {result.shared:6} registers {result.registers:3} spills {result.spills:4}  {constants}"
    )


def rows_of(results: Sequence[Resources]) -> list[Row]:
    """The most that any configuration of a kernel needs of each resource, for each chip and type of tokens."""
    rows = []
    dtypes = dict.fromkeys(result.build.dtype for result in results)
    for dtype, kernel, capability in itertools.product(dtypes, KERNELS, CAPABILITIES):
        wanted = dtype, kernel, capability
        found = [r for r in results if (r.build.dtype, r.build.kernel, r.build.capability) == wanted]
        parameters = {"dtype": dtype, "capability": capability / 10, "configurations": len(found)}
        rows += [
            Row(f"{kernel}: {name}", unit, [max(values)], parameters)
            for name, unit, values in (
                ("registers", "a thread", [r.registers for r in found]),
                ("shared memory", "bytes a block", [r.shared for r in found]),
                ("spills", "bytes a thread", [r.spills for r in found]),
            )
        ]
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Compile the chosen builds and print what each needs; 1 if one does not fit its chip or spills."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    choices = {
        "kernel": list(KERNELS),
        "dtype": list(ITEMSIZE),
        "pooling": list(POOLING_CODES),
        "adapters": ["no", "yes"],
        "capability": list(CAPABILITIES),
    }
    for name, values in choices.items():
        parser.add_argument(f"--{name}", type=type(values[0]), nargs="+", default=values, choices=values)
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of a table")
    parser.add_argument(
        "--jobs", type=int, default=len(os.sched_getaffinity(0)), help="compile so many at once"
    )
    options = parser.parse_args(arguments)
    adapted = [choice == "yes" for choice in options.adapters]
    chosen = [
        replace(build, capability=capability)
        for capability in options.capability
        for build in builds(options.dtype, options.pooling, adapted)
        if build.kernel in options.kernel
    ]
    results = []
    with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:
        for result in pool.map(compile_build, chosen):
            print(json.dumps(asdict(result)) if options.json else describe(result), flush=True)
            results.append(result)
    unfit = [result for result in results if not result.fits]
    whole = all(getattr(options, name) == values for name, values in choices.items() if name != "dtype")
    if whole and not options.json:
        rows = rows_of(results)
        print_rows("The most that any configuration needs", rows)
        verdict = (
            f"{len(results)} configurations compiled for tokens in {', '.join(options.dtype)}; "
            f"{len(unfit)} do not fit their chip or spill registers. Widths, ranks and strides are multiples of 16. "
            f"Code {code_digest(options.dtype)}."
        )
        path = append_record("kernel_resources", rows, notes=verdict)
        print(f"{verdict} Recorded in {path}.")
    return 1 if unfit else 0


if __name__ == "__main__":
    sys.exit(main())
