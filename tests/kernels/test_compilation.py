"""Every configuration compiles to machine code for the chips that it is meant for, and fits them; no GPU is needed.

Compilation fails while Triton's interpreter is on, so it runs in processes of its own. Poolings other than
transport, and features without adapters, are lighter builds of the same kernels:
``benchmarks/kernel_resources.py`` compiles those too.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "kernel_resources.py"
SHARED_MEMORY = {80: 163 * 1024, 87: 163 * 1024, 90: 227 * 1024}  # bytes that one block may have
REGISTERS_A_THREAD, REGISTERS_A_BLOCK = 255, 65536


def compiled(*arguments: str) -> list[dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, str(SCRIPT), "--json", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("capability", "dtypes"), [(80, ["bfloat16"]), (87, ["float16"]), (90, ["bfloat16", "float32"])]
)
def test_every_configuration_fits_the_chip_without_spills(capability: int, dtypes: list[str]) -> None:
    options = ["--pooling", "transport", "--adapters", "yes", "--capability", str(capability)]
    found = compiled("--dtype", *dtypes, *options)
    assert {result["build"]["kernel"] for result in found} == {
        "plane_kernel",
        "blocked_kernel",
        "plan_kernel",
        "label_gradient_kernel",
        "patch_gradient_kernel",
        "loss_kernel",
        "mean_kernel",
        "loss_gradient_kernel",
    }
    spilling = [result for result in found if result["spills"]]
    for result in found:
        assert result["shared"] <= SHARED_MEMORY[capability], result
        assert 0 < result["registers"] <= REGISTERS_A_THREAD, result
        assert result["registers"] * 32 * result["build"]["warps"] <= REGISTERS_A_BLOCK, result
    if spilling:
        # Known: the largest planes, and the loss for many labels. Whether smaller blocks are faster than a few
        # spills can only be told on a GPU, so they stay until one has been at hand.
        kernels = {result["build"]["kernel"] for result in spilling}
        assert kernels <= {"plane_kernel", "loss_kernel", "loss_gradient_kernel"}
        pytest.xfail(
            f"{len(spilling)} of {len(found)} configurations spill registers: {', '.join(sorted(kernels))}"
        )
