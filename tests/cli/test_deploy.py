"""The files of ``docs/deploy`` fit the command that they start."""

import json
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from fedmpt.cli import main

DEPLOY = Path(__file__).resolve().parents[2] / "docs" / "deploy"


def _unit_lines(name):
    lines = (DEPLOY / "fedmpt-client.service").read_text().splitlines()
    return [line.partition("=")[2] for line in lines if line.startswith(f"{name}=")]


def _docker_words():
    lines = (DEPLOY / "Dockerfile").read_text().splitlines()
    return [json.loads(line.partition(" ")[2]) for line in lines if line.startswith(("ENTRYPOINT ", "CMD "))]


@pytest.mark.parametrize(
    "words",
    [
        shlex.split(_unit_lines("ExecStart")[0]),
        [word for part in _docker_words() for word in part],
    ],
    ids=["systemd", "Docker"],
)
def test_unit_and_image_start_the_client_with_the_example_configuration(words, capsys):
    assert words[0].endswith("/fedmpt")
    words = [word.replace("/etc/fedmpt", str(DEPLOY)) for word in words]
    # All options are accepted; the first thing missing on this machine is the bundle.
    assert main(words[1:]) == 1
    assert "/srv/fedmpt/bundle/manifest.json: not found" in capsys.readouterr().err


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_finds_nothing_wrong_with_the_unit(tmp_path):
    text = (DEPLOY / "fedmpt-client.service").read_text()
    unit = tmp_path / "fedmpt-client.service"
    unit.write_text(text.replace("/opt/fedmpt/bin/fedmpt", "/bin/true"))
    result = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True)
    assert (result.returncode, [line for line in result.stderr.splitlines() if "fedmpt" in line]) == (0, [])
