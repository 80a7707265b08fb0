"""What a user reads when the system refuses: full disks, forbidden places, packages that are not installed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import requires
from pathlib import Path
from typing import Any

import pytest

from fedmpt.cli import main
from fedmpt.cli.main import EXTRAS
from fedmpt.simulation.demo import BUNDLE

CERTS = ["certs", "--federation", "farm", "--host", "localhost"]
EXPORT = ["export", "--bundle", BUNDLE, "--state", BUNDLE / "state.safetensors"]


def run(
    arguments: Sequence[object], *, missing: str = "no_such_module", file_bytes: int = -1, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run ``fedmpt`` in a process of its own, without a package, or where files cannot grow over ``file_bytes``."""
    code = (
        f"import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({file_bytes}, {file_bytes}))\n"
        f"sys.modules[{missing!r}] = None\n"
        "from fedmpt.cli import main; sys.exit(main())"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.run(command, text=True, env=environment, check=False, **streams)


@pytest.mark.parametrize(
    ("arguments", "output", "file_bytes"),
    [
        (CERTS, "certs", 300),  # the authority's certificate is larger, its key is not
        (EXPORT, "tagger.onnx", 100_000),
        (["conditions", "--labels", BUNDLE / "manifest.json"], "conditions.txt", 10),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_does_not_fit_is_named_and_leaves_nothing_behind(
    tmp_path: Path, arguments: list[object], output: str, file_bytes: int
) -> None:
    done = run([*arguments, "--out", tmp_path / output], file_bytes=file_bytes)
    assert (done.returncode, "Traceback" in done.stderr) == (1, False), done.stderr
    assert f"{tmp_path / output}: File too large; raise the limit on the size of files" in done.stderr
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_full_disk_behind_standard_output_is_told() -> None:
    with Path("/dev/full").open("w") as full:
        done = run(["simulate", "list"], stdout=full)
    assert done.returncode == 1
    assert done.stderr == (
        "fedmpt simulate: standard output: No space left on device; free some space and run it again\n"
    )


@pytest.mark.parametrize(
    "arguments",
    [
        [*CERTS, "--out"],
        [*EXPORT, "--out"],
        ["conditions", "--labels", BUNDLE / "manifest.json", "--out"],
        ["demo", "--out"],
        ["simulate", "voc-2007", "--store"],
        ["aggregator", "--bundle", BUNDLE, "--federation", "farm", "--embedded", "--store"],
    ],
    ids=lambda value: value[0],
)
def test_a_place_that_cannot_be_written_is_named_before_the_work(
    tmp_path: Path,
    arguments: list[object],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert main([*map(str, arguments), str(tmp_path / "file" / "out")]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"fedmpt {arguments[0]}: {tmp_path / 'file' / 'out'}")
    assert error.endswith(": Not a directory; a file is where a folder is to be; give another path\n")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("arguments", "missing"),
    [
        (["bundle", "--clip", "none", "--labels", BUNDLE / "manifest.json", "--out", "none"], "torch"),
        (["simulate", "voc-2007"], "torch"),
        (["simulate", "voc-2007"], "scipy"),
        (["simulate", "voc-2007", "--scheduler", "tcp://localhost:1"], "matplotlib"),
    ],
)
def test_a_missing_package_is_named_with_its_extra_before_the_work(
    tmp_path: Path, arguments: list[object], missing: str
) -> None:
    done = run(arguments, missing=missing, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr == (
        f"fedmpt {arguments[0]}: {missing} is not installed; run: pip install 'fedmpt-edge[workstation]'\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_module_that_no_extra_brings_is_a_fault_to_report(tmp_path: Path) -> None:
    done = run(["simulate", "list"], missing="fedmpt.simulation.experiments")
    assert "Traceback" in done.stderr


def test_the_extras_are_those_of_the_package() -> None:
    named = {
        extra for line in requires("fedmpt-edge") or [] for extra in re.findall(r"extra == .(\w+)", line)
    }
    assert set(EXTRAS.values()) <= named
