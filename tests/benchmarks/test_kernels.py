"""The kernels' benchmark as far as it goes without a GPU: inputs, the check against float64, floor and verdicts."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType
from typing import Any

import pytest
import record
import torch

from fedmpt.kernels import reference


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    """By its path: the name stands for other modules too."""
    spec = importlib.util.spec_from_file_location("kernels_benchmark", record.RESULTS.parent / "kernels.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what it does without a GPU")
def test_without_a_gpu_it_says_so_and_measures_nothing(
    kernels: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert kernels.main([]) == 1
    assert "needs an NVIDIA GPU and a CUDA build of PyTorch" in capsys.readouterr().err


@pytest.mark.parametrize("pooling", reference.POOLINGS)
def test_the_check_holds_a_head_to_float64(kernels: ModuleType, pooling: str) -> None:
    case = kernels.Case(2, 3, pooling=pooling, adapters=True)
    trained, cached = kernels.make_inputs(case, device="cpu")
    head = kernels.head_of(reference, reference, case)
    assert kernels.check(head, head, trained, cached) < 1e-4

    def wrong(trained: Any, cached: Any) -> Any:
        return 1.1 * head(trained, cached)

    with pytest.raises(RuntimeError, match="the kernels differ from float64"):
        kernels.check(wrong, head, trained, cached)


def test_the_floor_is_the_slower_of_reading_and_multiplying(kernels: ModuleType) -> None:
    case = kernels.Case(32, 20)
    read, multiplied = 2 * 32 * 197 * 512 * 2, 2 * 2 * 32 * 197 * 512 * 5 * 20
    assert kernels.floor_seconds(case, {"copy_bytes": 1.0, "matmul_flops": 1e30}) == read
    assert kernels.floor_seconds(case, {"copy_bytes": 1e30, "matmul_flops": 1.0}) == multiplied


def test_verdicts_take_the_worst_case_and_say_what_was_not_measured(kernels: ModuleType) -> None:
    samples = [{"triton": [1.0], "eager": [eager]} for eager in (30.0, 12.0)]
    rows = [
        row
        for found in samples
        for row in kernels.compare("head, replayed", "s", found, kernels.Case(32, 20), 0.5)
    ]
    rows.append(record.Row("local step", "s", [7e-3]))
    lines = kernels.verdicts(rows)
    assert "12.00 times faster, replayed, than eager, aim 10.0: reached" in lines
    assert "0.50 of the floor, aim 0.33: reached" in lines
    assert "0.71 local steps in 0.005 s, aim 1: missed" in lines
    assert "times less memory than eager, aim 10.0: not measured" in lines
