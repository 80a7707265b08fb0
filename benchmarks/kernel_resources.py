"""Compile the Triton kernels to machine code without a GPU, and report what each needs of the chip.

    python benchmarks/kernel_resources.py                                  # everything; takes long
    python benchmarks/kernel_resources.py --dtype float16 --capability 90  # a part of it

Shared memory comes from Triton's metadata, registers and spills from ptxas. ``TRITON_INTERPRET`` must be unset.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fedmpt.kernels import triton_asymmetric_loss as loss
from fedmpt.kernels import triton_region_tiles as tiles
from fedmpt.kernels.triton_region_backward import label_gradient_kernel, patch_gradient_kernel, plan_kernel
from fedmpt.kernels.triton_region_forward import blocked_kernel, plane_kernel
from fedmpt.kernels.triton_region_transport import POOLING_CODES

CAPABILITIES = (80, 87, 90)  # A100, Jetson Orin, H100

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


@dataclass(frozen=True)
class Resources:
    """What ptxas and Triton say of a build: bytes of shared memory and of spills, registers a thread."""

    build: Build
    shared: int
    registers: int
    spills: int


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
    return Build(kernel, dtype, tile.warps, tile.stages, tuple((shared | constants).items()))


def builds(dtypes: Iterable[str], poolings: Iterable[str], adapters: Iterable[bool]) -> Iterator[Build]:
    """Every kernel with every configuration that can be chosen for these dtypes, poolings and adapters."""
    for dtype, pooling, adapted in itertools.product(dtypes, poolings, adapters):
        itemsize = ITEMSIZE[dtype]
        for tile in tiles.PLANES[itemsize]:
            choices = (True, False) if pooling == "transport" else (False,)
            for scaling in (choice for choice in choices if choice or tile.keep):
                yield build("plane_kernel", dtype, tile, pooling, adapted, SCALING=scaling, KEEP=tile.keep)
        for tile in tiles.BLOCKED[itemsize]:
            yield build("blocked_kernel", dtype, tile, pooling, adapted)
        for tile in tiles.GRADIENTS[itemsize]:
            yield build("plan_kernel", dtype, tile, pooling, adapted)
            yield build("label_gradient_kernel", dtype, tile, pooling, adapted, BLOCK_Y=tile.y)
            yield build(
                "patch_gradient_kernel", dtype, tile, pooling, adapted, BLOCK_Y=tile.y, WRITE_NORM=False
            )
            if adapted:
                block = tiles.rank_block(32)
                yield build("label_gradient_kernel", dtype, tile, pooling, adapted, BLOCK_Y=block)
                yield build(
                    "patch_gradient_kernel", dtype, tile, pooling, adapted, BLOCK_Y=block, WRITE_NORM=True
                )
    yield loss_build("mean_kernel", "float32", BLOCK=loss.REDUCE_BLOCK)
    for dtype, clipped, conditions in itertools.product(dtypes, (True, False), (8, loss.MAXIMUM_CONDITIONS)):
        for kernel in ("loss_kernel", "loss_gradient_kernel"):
            yield loss_build(kernel, dtype, CLIPPED=clipped, BLOCK_N=conditions, BLOCK_C=loss.BLOCK_C)


def loss_build(kernel: str, dtype: str, **constants: Any) -> Build:
    """A kernel as ``triton_asymmetric_loss`` launches it."""
    return Build(kernel, dtype, loss.WARPS, 3, tuple(constants.items()))


def compile_build(build: Build) -> Resources:
    """Compile for the build's capability; nothing is launched."""
    kernel = KERNELS[build.kernel]
    region_kernel = "z_ptr" in kernel.arg_names
    typed = ("z_ptr", "t_ptr", "h_ptr", "k_ptr", "y_ptr") if region_kernel else ("psi_ptr",)
    constants = dict(build.constants)
    if region_kernel:  # a contiguous last dimension, as cached tokens have it
        constants |= {name: 1 for name in ("stride_d", "y_stride_d") if name in kernel.arg_names}
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
            options={"num_warps": build.warps, "num_stages": build.stages, "enable_fp_fusion": True},
        )
    registers = re.search(r"Used (\d+) registers", log.getvalue())
    spills = re.findall(r"(\d+) bytes spill", log.getvalue())
    if registers is None or not spills:
        raise RuntimeError(f"{build}: ptxas reported no resources:\n{log.getvalue()}")
    return Resources(build, compiled.metadata.shared, int(registers[1]), sum(map(int, spills)))


def describe(result: Resources) -> str:
    """One line of the table."""
    build = result.build
    constants = " ".join(f"{name.removeprefix('BLOCK_')}={value}" for name, value in build.constants)
    return (
        f"{build.kernel:22} sm_{build.capability} {build.dtype:8} warps {build.warps:2} stages {build.stages} "
        f"shared {result.shared:6} registers {result.registers:3} spills {result.spills:4}  {constants}"
    )


def main(arguments: list[str] | None = None) -> int:
    """Compile the chosen builds and print what each needs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--kernel", nargs="*", default=list(KERNELS), choices=list(KERNELS))
    parser.add_argument("--dtype", nargs="*", default=list(ITEMSIZE), choices=list(ITEMSIZE))
    parser.add_argument("--pooling", nargs="*", default=list(POOLING_CODES), choices=list(POOLING_CODES))
    parser.add_argument("--adapters", nargs="*", default=["no", "yes"], choices=["no", "yes"])
    parser.add_argument("--capability", type=int, nargs="*", default=CAPABILITIES, choices=CAPABILITIES)
    options = parser.parse_args(arguments)
    adapted = [choice == "yes" for choice in options.adapters]
    for capability in options.capability:
        for chosen in builds(options.dtype, options.pooling, adapted):
            if chosen.kernel in options.kernel:
                result = compile_build(replace(chosen, capability=capability))
                print(json.dumps(asdict(result)) if options.json else describe(result), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
