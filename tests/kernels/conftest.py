"""The Triton tests run on a GPU or, without one, in Triton's interpreter, in the process of ``test_interpreter.py``."""

import os

import numpy as np
import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

TRITON_TESTS = ["test_triton_asymmetric_loss.py", "test_triton_region_transport.py"]
collect_ignore = [] if INTERPRETED or torch.cuda.is_available() else TRITON_TESTS


def pytest_configure() -> None:
    if INTERPRETED:
        _teach_bfloat16_to_the_interpreter()


@pytest.fixture(scope="session")
def device() -> str:
    return "cpu" if INTERPRETED else "cuda"


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every float tensor that is allocated without a value holds NaN: what a kernel fails to write shows."""
    originals = torch.empty, torch.Tensor.new_empty

    def poison(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: poison(originals[0](*args, **kwargs)))
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda *args, **kwargs: poison(originals[1](*args, **kwargs))
    )


def _teach_bfloat16_to_the_interpreter() -> None:
    """Triton's interpreter keeps bfloat16 as uint16, multiplies those, and truncates where a GPU rounds."""
    from triton.runtime import interpreter

    builder, tl = interpreter.InterpreterBuilder, interpreter.tl
    original_dot, original_cast = builder.create_dot, builder.cast_impl

    def widened(handle: interpreter.TensorHandle) -> interpreter.TensorHandle:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        return original_dot(self, widened(a), widened(b), d, input_precision, max_num_imprecise_acc)

    def cast_impl(self, src, dst_type):
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            rounded = torch.from_numpy(np.ascontiguousarray(src.data)).bfloat16().view(torch.uint16)
            return interpreter.TensorHandle(rounded.numpy(), tl.bfloat16)
        return original_cast(self, src, dst_type)

    builder.create_dot, builder.cast_impl = create_dot, cast_impl
