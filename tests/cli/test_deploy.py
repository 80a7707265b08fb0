"""The files of ``docs/deploy`` fit the command that they start."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fedmpt.cli import main

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "docs" / "deploy"


def _unit_lines(name):
    lines = (DEPLOY / "fedmpt-client.service").read_text().splitlines()
    return [line.partition("=")[2] for line in lines if line.startswith(f"{name}=")]


def _docker_instructions():
    """(instruction, arguments) in order, continued lines joined."""
    text = (DEPLOY / "Dockerfile").read_text().replace("\\\n", "")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in lines)]


def _docker_words():
    return [json.loads(rest) for word, rest in _docker_instructions() if word in ("ENTRYPOINT", "CMD")]


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


def test_the_unit_tries_again_for_ever_but_for_wrong_usage(capsys):
    words = [word.replace("/etc/fedmpt", str(DEPLOY)) for word in shlex.split(_unit_lines("ExecStart")[0])]
    with pytest.raises(SystemExit) as usage_error:
        main([*words[1:], "--no-such-option"])
    assert _unit_lines("Restart") == ["on-failure"]
    assert _unit_lines("StartLimitIntervalSec") == ["0"]
    assert _unit_lines("RestartPreventExitStatus") == [str(usage_error.value.code)]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_finds_nothing_wrong_with_the_unit(tmp_path):
    text = (DEPLOY / "fedmpt-client.service").read_text()
    unit = tmp_path / "fedmpt-client.service"
    unit.write_text(text.replace("/opt/fedmpt/bin/fedmpt", "/bin/true"))
    result = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True)
    assert (result.returncode, [line for line in result.stderr.splitlines() if "fedmpt" in line]) == (0, [])


def test_every_shell_line_of_the_image_parses_and_uses_declared_arguments():
    known = set()
    for word, rest in _docker_instructions():
        if word == "ARG":
            known.add(rest.partition("=")[0])
        assert set(re.findall(r"\$\{(\w+)", rest)) <= known
        if word == "FROM":
            known = set()  # an argument from before it holds in FROM alone
        elif word == "RUN":
            subprocess.run(["sh", "-n", "-c", rest], check=True)


def test_unit_and_image_keep_onnx_runtime_from_reporting_to_its_maker():
    assert "ORT_DISABLE_TELEMETRY=1" in _unit_lines("Environment")
    assert ("ENV", "ORT_DISABLE_TELEMETRY=1") in _docker_instructions()


def test_the_images_context_has_all_that_the_package_is_built_from():
    lines = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    let_through = {line[1:] for line in lines if line.startswith("!")}
    configuration = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project, folders = configuration["project"], configuration["tool"]["setuptools"]["package-dir"].values()
    assert let_through == {"pyproject.toml", project["readme"], *project["license-files"], *folders}


def test_the_image_installs_exactly_one_onnx_runtime_and_leaves_root():
    instructions = _docker_instructions()
    installs = [rest for word, rest in instructions if word == "RUN" and "pip install" in rest]
    assert ["${RUNTIME}" in line for line in installs] == [True, False]
    assert "[" not in installs[1], "an extra would add the other runtime"
    assert ("USER", "fedmpt") in instructions
    assert any(word == "RUN" and rest.startswith("useradd ") for word, rest in instructions)
