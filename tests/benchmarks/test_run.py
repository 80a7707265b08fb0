"""The suite: every benchmark there is, run in turn, with a reason for what is left out."""

from __future__ import annotations

from pathlib import Path

import pytest
import record
import run
from suite import SUITE, Benchmark, missing

WORKING = "import sys, pathlib; pathlib.Path(__file__).with_name('works.jsonl').open('a').write('{}\\n')"


@pytest.fixture
def scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(run, "RESULTS", tmp_path)
    for name, text in (("works", WORKING), ("breaks", "raise SystemExit(3)"), ("silent", "")):
        (tmp_path / f"{name}.py").write_text(text)
    return tmp_path


def benchmark(name: str, **needs: tuple[str, ...]) -> Benchmark:
    return Benchmark(name, "title", "compares", packages=needs.pop("packages", ()), **needs)


@pytest.mark.parametrize("name", [benchmark.name for benchmark in SUITE])
def test_every_benchmark_of_the_suite_exists_and_is_documented(name: str) -> None:
    folder = record.RESULTS.parent
    assert f'append_record("{name}"' in (folder / f"{name}.py").read_text()
    assert f"| `{name}.py` |" in (folder / "README.md").read_text()


def test_every_script_is_documented() -> None:
    folder = record.RESULTS.parent
    names = [path.name for path in folder.glob("*.py")]
    assert [name for name in names if name not in (folder / "README.md").read_text()] == []


def test_a_benchmark_that_leaves_a_record_has_run(scripts: Path) -> None:
    assert run.perform(benchmark("works"), folder=scripts).startswith("recorded in ")


def test_a_benchmark_that_fails_is_named_with_its_exit_code(scripts: Path) -> None:
    assert run.perform(benchmark("breaks"), folder=scripts).startswith("FAILED with exit code 3")


def test_a_benchmark_without_a_record_has_failed(scripts: Path) -> None:
    assert run.perform(benchmark("silent"), folder=scripts).startswith("FAILED: it ended after")


def test_what_a_machine_lacks_is_said(scripts: Path) -> None:
    needy = benchmark("works", packages=("no_such_package",), commands=("no-such-command",))
    assert missing(needy) == ["Python package no_such_package", "command no-such-command"]
    said = run.perform(needy, folder=scripts)
    assert said == "left out: no Python package no_such_package, no command no-such-command"


def test_an_optional_package_that_is_absent_is_said(scripts: Path) -> None:
    said = run.perform(benchmark("works", optional=("no_such_package",)), dry=True, folder=scripts)
    assert said == "would run, without no_such_package"


def test_an_unknown_name_is_refused_with_those_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run.main(["codek"])
    assert "no benchmark codek; there are local_step, " in capsys.readouterr().err
