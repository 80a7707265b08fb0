"""The README's commands, run as they stand there, but for the substitutions of one table.

Left out: installation and the test command itself, and the demo, which the check script runs from the wheel.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PHOTOS = Path(os.environ.get("FEDMPT_PHOTOS", ROOT.parent / "shared" / "photos"))
SECONDS = 280


def shell_blocks() -> list[str]:
    """All shell blocks in order, without those that install."""
    blocks = re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL)
    return [block for block in blocks if "pip install" not in block]


def test_the_two_commands_are_there() -> None:
    assert "\npip install '.[cpu]' && fedmpt demo\n" in README
    assert re.search(r"\npip install torch==\S+ '\.\[cpu,dev,workstation\]' && pytest\n", README)


def test_every_command_of_the_readme_exists() -> None:
    from fedmpt.cli.main import COMMANDS

    called = set(re.findall(r"\bfedmpt ([a-z]+) ", "\n".join(shell_blocks())))
    assert called <= set(COMMANDS)
    assert {"bundle", "cache", "aggregator", "client", "evaluate", "export", "tag"} <= called


def test_every_link_of_the_readme_leads_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert [link for link in links if "://" not in link and not (ROOT / link).exists()] == []


@pytest.mark.slow
@pytest.mark.skipif(not (PHOTOS / "voc").is_dir(), reason=f"no photographs at {PHOTOS}; set FEDMPT_PHOTOS")
def test_the_run_on_real_photos(
    tmp_path: Path, tiny_clip: Path, mosquitto_program: str, free_port: Callable[[], int]
) -> None:
    port = free_port()
    substitutions = {
        "openai/clip-vit-base-patch16": str(tiny_clip),
        "broker.example:8883": f"localhost:{port}",
        "--host broker.example": f"--host localhost --port {port}",
        "--rounds 10": "--rounds 2",
        "mosquitto -c": f"{mosquitto_program} -c",
    }
    script = "\n".join(shell_blocks())
    for old, new in substitutions.items():
        assert old in script, f"the README no longer says {old!r}"
        script = script.replace(old, new)
    (tmp_path / "VOC2007").symlink_to(PHOTOS / "voc")
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with (tmp_path / "output.txt").open("wb") as output:
        process = subprocess.Popen(
            ["bash", "-euc", script],
            cwd=tmp_path,
            env=environment,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        try:
            code: int | str = process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            code = f"still running after {SECONDS} s"
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert code == 0, f"{code}\n{(tmp_path / 'output.txt').read_text()}"
    lines = [json.loads(line) for line in (tmp_path / "tags.jsonl").read_text().splitlines()]
    assert len(lines) == len(list((PHOTOS / "voc" / "JPEGImages").glob("*.jpg")))
    assert (tmp_path / "model-card.md").exists()
