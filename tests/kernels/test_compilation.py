"""Every configuration compiles to machine code for the chips that it is meant for, and fits them; no GPU is needed.

Compilation fails while Triton's interpreter is on, so it runs in processes of its own. Here the heaviest builds, one
or two dtypes a chip; the committed record is of all, and must be of the present code.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SHARED_MEMORY = {80: 163 * 1024, 87: 163 * 1024, 90: 227 * 1024}  # bytes that one block may have
REGISTERS_A_THREAD, REGISTERS_A_BLOCK = 255, 65536


def compiled(*arguments: str) -> list[dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, str(BENCHMARKS / "kernel_resources.py"), "--json", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert found, result.stderr[-4000:]
    assert result.returncode == (1 if any(map(unfit, found)) else 0), result.stderr[-4000:]
    return found


def unfit(result: dict[str, Any]) -> list[str]:
    """What a build takes more of than its chip has, in words."""
    build, registers = result["build"], result["registers"]
    checks = {
        "shared memory": result["shared"] <= SHARED_MEMORY[build["capability"]],
        "registers a thread": 0 < registers <= REGISTERS_A_THREAD,
        "registers a block": registers * 32 * build["warps"] <= REGISTERS_A_BLOCK,
        "spills": result["spills"] == 0,
    }
    return [name for name, holds in checks.items() if not holds]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("capability", "dtypes"), [(80, ["bfloat16"]), (87, ["float16"]), (90, ["bfloat16", "float32"])]
)
def test_the_heaviest_configurations_fit_the_chip_without_spills(capability: int, dtypes: list[str]) -> None:
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
    assert [(result, unfit(result)) for result in found if unfit(result)] == []


@pytest.mark.parametrize("dtype", ["float16", "float32"])  # bfloat16 has float16's configurations
def test_the_record_of_all_configurations_is_of_these_kernels_and_without_spills(dtype: str) -> None:
    import kernel_resources

    lines = (BENCHMARKS / "results" / "kernel_resources.jsonl").read_text().splitlines()
    code = f"tokens in {dtype}; 0 do not fit their chip or spill registers."
    record = next(record for record in map(json.loads, reversed(lines)) if code in record["notes"])
    assert record["notes"].endswith(f"Code {kernel_resources.code_digest([dtype])}."), (
        f"the kernels have changed: run python benchmarks/kernel_resources.py --dtype {dtype}"
    )
    spills = [row for row in record["rows"] if row["name"].endswith("spills")]
    assert spills
    assert not any(row["median"] for row in spills)


ONES = """
from dataclasses import replace
import kernel_resources as resources

sizes = ("B", "N", "M", "C", "iterations", "parts", "images_per_group")
first = {build.kernel: build for build in resources.builds(["float16"], ["transport"], [False])}
for build in first.values():
    ones = tuple((name, 1) for name in sizes if name in resources.KERNELS[build.kernel].arg_names)
    resources.compile_build(replace(build, constants=build.constants + ones))
    print(build.kernel)
"""


@pytest.mark.slow
def test_sizes_of_one_compile_although_triton_makes_constants_of_them() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(BENCHMARKS)
    result = subprocess.run(
        [sys.executable, "-c", ONES], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-4000:]
    assert len(result.stdout.splitlines()) == 8
