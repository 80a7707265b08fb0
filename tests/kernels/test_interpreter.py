"""Without a GPU, the Triton tests run in Triton's interpreter, which must be chosen before Triton is imported."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
NAMES = (
    "edge_client/test_torch_capture.py",
    "kernels/test_triton_region_transport.py",
    "kernels/test_triton_asymmetric_loss.py",
)


@pytest.fixture(scope="module")
def interpreted(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[[str], subprocess.CompletedProcess[str]]]:
    """How each file's tests ended; the files run side by side, since each keeps one core busy."""
    folder = tmp_path_factory.mktemp("interpreted")
    command = [sys.executable, "-m", "pytest", "-q", f"--rootdir={ROOT}", "-c", str(ROOT / "pyproject.toml")]

    def run(name: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, str(ROOT / "tests" / name)],
            cwd=folder,
            env=os.environ | {"TRITON_INTERPRET": "1"},
            capture_output=True,
            text=True,
            check=False,
        )

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        runs = {name: pool.submit(run, name) for name in NAMES}
        yield lambda name: runs[name].result()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the same tests run on it")
@pytest.mark.parametrize("name", NAMES)
def test_kernels_in_the_interpreter(
    name: str, interpreted: Callable[[str], subprocess.CompletedProcess[str]]
) -> None:
    result = interpreted(name)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
