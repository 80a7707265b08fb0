"""What holds for every subcommand: help with an example, --json, exit codes, errors without a traceback."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fedmpt.cli.main import COMMANDS, main

RUN = [sys.executable, "-c", "import sys; from fedmpt.cli import main; sys.exit(main())"]


def help_of(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example_that_calls_the_command(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = help_of(command, capsys)
    assert "Example" in text
    assert f"fedmpt {command}" in text.split("Example", 1)[1]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_can_speak_json(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--json" in help_of(command, capsys)


def test_the_overview_lists_every_command_with_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    for command, (_, line) in COMMANDS.items():
        assert command in text
        assert line.split()[0] in text


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["no-such-command"],
        ["tag", "--no-such-option"],
        ["simulate", "voc-2007", "--workers", "0"],
        ["simulate", "voc-2007", "--scheduler", "head-node"],
        ["certs", "--out", "none", "--federation", "farm", "--host", "bücher.example"],
        ["certs", "--out", "none", "--federation", "farm", "--host", "::1", "--port", "70000"],
        ["certs", "--out", "none", "--federation", "farm", "--host", "broker.example", "--days", "0"],
    ],
)
def test_wrong_usage_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "usage: fedmpt" in capsys.readouterr().err


def test_an_expected_failure_exits_with_1_and_names_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", "--bundle", str(tmp_path), "--cache", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("fedmpt evaluate: ")
    assert str(tmp_path / "manifest.json") in error
    assert "Traceback" not in error


def test_a_command_imports_only_what_it_needs() -> None:
    code = (
        "import sys\nfrom fedmpt.cli import main\n"
        "try: main(['status', '--help'])\nexcept SystemExit: pass\n"
        "print(*sorted({'torch', 'onnx', 'onnxruntime', 'PIL', 'transformers'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.split() == []


def test_a_reader_that_goes_away_is_no_crash() -> None:
    process = subprocess.Popen([*RUN, "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    error = process.stderr.read().decode()
    process.stderr.close()
    process.wait(30)
    assert "Traceback" not in error


def test_the_list_of_experiments_speaks_json_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["voc-2007"] == "PASCAL VOC 2007"
