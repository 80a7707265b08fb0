"""``fedmpt conditions`` writes a usable list in every case and says when it is not the one asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedmpt.cli import conditions as command
from fedmpt.cli import main
from fedmpt.export.conditions import DEFAULT_CONDITIONS, ConditionsError, Endpoint


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    path = tmp_path / "labels.txt"
    path.write_text("cat\n# a comment\n\ndog\n")
    return path


def test_without_an_endpoint_the_default_list_is_written(
    labels: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = labels.with_name("conditions.txt")
    assert main(["conditions", "--labels", str(labels), "--out", str(out)]) == 0
    assert tuple(out.read_text().splitlines()) == DEFAULT_CONDITIONS
    assert capsys.readouterr().out == out.read_text()


def test_a_failure_is_told_and_the_default_list_written(
    labels: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(labels: list[str], count: int, endpoint: Endpoint, **more: object) -> tuple[str, ...]:
        raise ConditionsError(f"{endpoint.url}: no usable conditions")

    monkeypatch.setattr(command, "derive_conditions", fail)
    out = labels.with_name("conditions.txt")
    words = [
        "conditions",
        "--labels",
        str(labels),
        "--out",
        str(out),
        "--endpoint",
        "http://x/v1",
        "--model",
        "m",
    ]
    assert main([*words, "--json"]) == 1
    printed = capsys.readouterr()
    assert json.loads(printed.out)["source"] == "default"
    assert "http://x/v1: no usable conditions" in printed.err
    assert f"{out}: holds the default list now" in printed.err
    assert tuple(out.read_text().splitlines()) == DEFAULT_CONDITIONS


def test_derived_conditions_are_written_and_the_key_comes_from_the_environment(
    labels: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Endpoint] = []

    def derive(labels: list[str], count: int, endpoint: Endpoint, **more: object) -> tuple[str, ...]:
        seen.append(endpoint)
        assert labels == ["cat", "dog"]
        return ("one", "two")[:count]

    monkeypatch.setattr(command, "derive_conditions", derive)
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    out = labels.with_name("conditions.txt")
    words = ["--endpoint", "http://x/v1", "--model", "m", "--count", "2"]
    assert main(["conditions", "--labels", str(labels), "--out", str(out), *words]) == 0
    assert out.read_text() == "one\ntwo\n"
    assert seen == [Endpoint("http://x/v1", "m", "secret")]
    printed = capsys.readouterr()
    assert "secret" not in printed.out + printed.err


def test_an_endpoint_without_a_model_is_refused(labels: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--labels", str(labels), "--out", str(labels), "--endpoint", "http://x/v1"]
    assert main(["conditions", *words]) == 1
    assert "--endpoint needs --model" in capsys.readouterr().err


def test_an_empty_label_file_is_refused(labels: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels.write_text("# nothing\n")
    assert main(["conditions", "--labels", str(labels), "--out", str(labels)]) == 1
    assert "holds no names; give one per line" in capsys.readouterr().err
