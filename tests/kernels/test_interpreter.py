"""Without a GPU, the Triton tests run in Triton's interpreter, which must be chosen before Triton is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the same tests run on it")
@pytest.mark.parametrize(
    "name",
    [
        "kernels/test_triton_asymmetric_loss.py",
        "kernels/test_triton_region_transport.py",
        "edge_client/test_torch_capture.py",
    ],
)
def test_kernels_in_the_interpreter(name: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", f"--rootdir={ROOT}", "-c", str(ROOT / "pyproject.toml")]
    result = subprocess.run(
        [*command, str(ROOT / "tests" / name)],
        cwd=tmp_path,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
