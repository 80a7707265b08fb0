"""One TOML file for aggregator and client: command line over file over defaults, and nothing unknown."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from fedmpt.cli.options import OptionsError, allow_config, resolve


def parse(*arguments: str, table: str = "aggregator") -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--clients-min", type=int, default=1, help="at least (%(default)s)")
    parser.add_argument("--strategy", choices=("uniform", "median"), default="uniform")
    parser.add_argument("--deadline", type=float)
    parser.add_argument("--no-metrics", action="store_true")
    allow_config(parser, table)
    return resolve(parser.parse_args(arguments))


@pytest.fixture
def write(tmp_path: Path):
    def write_config(text: str) -> str:
        path = tmp_path / "fedmpt.toml"
        path.write_text(text)
        return str(path)

    return write_config


def test_defaults_hold_without_a_file() -> None:
    arguments = parse("--bundle", "b")
    assert (arguments.clients_min, arguments.strategy, arguments.no_metrics) == (1, "uniform", False)


def test_the_file_supplies_options_even_required_ones(write) -> None:
    config = write(
        '[aggregator]\nbundle = "b"\nclients-min = 4\nno-metrics = true\ndeadline = 60\n[client]\nname = "x"\n'
    )
    arguments = parse("--config", config)
    assert (arguments.clients_min, arguments.no_metrics, arguments.deadline) == (4, True, 60.0)
    assert arguments.bundle == Path(config).parent / "b"


def test_the_command_line_wins(write) -> None:
    config = write('[aggregator]\nbundle = "b"\nclients_min = 4\n')
    arguments = parse("--config", config, "--clients-min", "1", "--bundle", "mine")
    assert (arguments.clients_min, arguments.bundle) == (1, Path("mine"))


def test_the_other_table_is_not_read(write) -> None:
    arguments = parse("--bundle", "b", "--config", write("[client]\nclients-min = 9\n"))
    assert arguments.clients_min == 1


def test_a_missing_required_option_is_wrong_usage(capsys: pytest.CaptureFixture[str], write) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse("--config", write("[aggregator]\n"))
    assert "required: --bundle" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            "[aggregator]\nclient-min = 4\n",
            r"\[aggregator\] client-min is unknown; did you mean clients-min\?",
        ),
        ("[agregator]\n", r"table \[agregator\] is unknown; did you mean aggregator\?"),
        ("[aggregator]\nzzz = 1\n", "known are bundle, clients-min"),
        ('[aggregator]\nclients-min = "many"\n', "clients-min: 'many' cannot be used"),
        ("[aggregator]\nclients-min = 1.5\n", "clients-min: 1.5 cannot be used"),
        ("[aggregator]\nclients-min = true\n", "clients-min: expected a text or a number, got True"),
        ('[aggregator]\nstrategy = "mean"\n', "strategy: 'mean' is none of uniform, median"),
        ('[aggregator]\nno-metrics = "yes"\n', "no-metrics: write true or false"),
        ("[aggregator\n", "not valid TOML"),
        ("aggregator = 1\n", r"write \[aggregator\]"),
    ],
)
def test_a_wrong_file_is_named_with_its_place(text: str, problem: str, write) -> None:
    with pytest.raises(OptionsError, match=problem):
        parse("--bundle", "b", "--config", write(text))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(OptionsError, match=r"none.toml: cannot be read \(No such file"):
        parse("--bundle", "b", "--config", str(tmp_path / "none.toml"))


def test_help_still_shows_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        parse("--help")
    assert "at least (1)" in capsys.readouterr().out
