"""Experiments: a TOML file becomes runs; runs become a CSV, intervals, plots and pages."""

from __future__ import annotations

import csv
import io
import math
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from fedmpt.simulation.experiments import (
    SHIPPED,
    Experiment,
    ExperimentError,
    load_experiment,
    parse_experiment,
)
from fedmpt.simulation.experiments_report import (
    Rows,
    draw_plot,
    estimate,
    results_csv,
    summarise,
    write_experiment,
)

DOCUMENT: dict[str, Any] = {
    "title": "Strength",
    "question": "Does it help?",
    "settings": {"rounds": 3, "strength": 0},
    "grid": [
        {"method": ["coop", "zero-shot"], "seed": [0, 1, 2]},
        {"variant": "long", "method": "coop", "rounds": 9, "seed": [0, 1, 2]},
    ],
    "plot": [{"x": "method", "y": ["test.mAP"], "by": "variant"}],
}


def experiment(**changes: Any) -> Experiment:
    return parse_experiment("strength", {**DOCUMENT, **changes}, "strength.toml")


def rows() -> Rows:
    return [(run, {"test.mAP": 0.5 + run.settings.seed / 10, "bytes": 7.0}) for run in experiment().runs]


def test_grids_are_products_that_are_joined() -> None:
    runs = experiment().runs
    assert [(run.variant, run.settings.method, run.settings.rounds, run.settings.seed) for run in runs] == [
        *(("", method, 3, seed) for method in ("coop", "zero-shot") for seed in range(3)),
        *(("long", "coop", 9, seed) for seed in range(3)),
    ]


def test_a_variant_is_named_with_its_settings() -> None:
    grid = [{"variant": "τ {tau:g}", "tau": [0.5, 4.0]}]
    assert [run.variant for run in experiment(grid=grid).runs] == ["τ 0.5", "τ 4"]
    with pytest.raises(ExperimentError, match=r"variant = '\{tua\}': 'tua' is no setting"):
        experiment(grid=[{"variant": "{tua}"}])


def test_a_plot_draws_one_variant_and_one_line_for_each_combination() -> None:
    plots = [{"x": "seed", "y": ["test.mAP"], "by": ["method", "rounds"], "only": ""}]
    svg = draw_plot(experiment(plot=plots).plots[0], rows())
    assert "coop, 3" in svg
    assert "zero-shot, 3" in svg
    assert "coop, 9" not in svg


def test_the_varying_fields_are_found() -> None:
    assert experiment().varying == ("variant", "method", "rounds")


def test_equal_settings_share_a_result_whatever_the_variant_is_called() -> None:
    other = experiment(grid=[{"variant": "renamed", "method": "coop", "seed": 1}]).runs[0]
    assert other.key in {run.key for run in experiment().runs}
    assert len({run.key for run in experiment().runs}) == 9


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"setings": {}}, r"unknown key 'setings'; did you mean 'settings'\?"),
        ({"settings": {"round": 3}}, r"\[settings\]: unknown key 'round'; did you mean 'rounds'\?"),
        ({"grid": [{"metod": ["coop"]}]}, r"\[\[grid\]\]: unknown key 'metod'; did you mean 'method'\?"),
        ({"plot": [{"x": "strenght", "y": [], "by": "method"}]}, r"did you mean 'strength'\?"),
        ({"settings": {"rounds": "many"}}, "rounds = 'many': expected int"),
        ({"settings": {"calibrate": 1}}, "calibrate = 1: expected bool"),
    ],
)
def test_a_mistake_is_named_with_its_place(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ExperimentError, match=message):
        experiment(**changes)


def test_a_missing_experiment_lists_the_shipped_ones() -> None:
    with pytest.raises(ExperimentError, match=r"not found; give a TOML file or one of "):
        load_experiment("no-such-experiment")


def test_a_shared_setting_can_be_changed_by_name(tmp_path: Path) -> None:
    path = tmp_path / "small.toml"
    path.write_text('title = "Small"\n[settings]\nrounds = 8\n[[grid]]\nseed = [0, 1]\n')
    changed = load_experiment(str(path), ["rounds=2", "root=/data/voc", "strength = 0.5"])
    settings = changed.runs[1].settings
    assert (settings.rounds, settings.root, settings.strength, settings.seed) == (2, "/data/voc", 0.5, 1)
    with pytest.raises(ExperimentError, match="unknown key 'rouns'"):
        load_experiment(str(path), ["rouns=2"])
    with pytest.raises(ExperimentError, match="write it as KEY=VALUE"):
        load_experiment(str(path), ["rounds"])


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.toml")), ids=lambda path: path.stem)
def test_every_shipped_experiment_parses_and_has_three_seeds_or_needs_the_users_data(path: Path) -> None:
    shipped = load_experiment(path.stem)
    assert shipped.question
    assert shipped.plots
    assert len({run.settings.seed for run in shipped.runs}) >= 3


def test_the_interval_is_where_a_t_test_turns() -> None:
    values = [0.61, 0.55, 0.58, 0.64]
    result = estimate(values)
    assert result.mean == pytest.approx(np.mean(values))
    assert ttest_1samp(values, result.mean - result.half_width).pvalue == pytest.approx(0.05)


def test_a_single_seed_has_no_interval() -> None:
    result = estimate([0.5])
    assert math.isnan(result.half_width)
    assert str(result) == "0.500"


def test_seeds_are_pooled_and_settings_are_not() -> None:
    summary = summarise(rows(), ["method", "rounds"], "test.mAP")
    assert set(summary) == {("coop", 3), ("zero-shot", 3), ("coop", 9)}
    assert summary["coop", 9].count == 3
    assert summary["coop", 9].mean == pytest.approx(0.6)


def test_the_csv_has_one_row_per_run_with_settings_and_metrics() -> None:
    records = list(csv.DictReader(io.StringIO(results_csv(experiment(), rows()))))
    assert len(records) == 9
    assert records[-1] == {
        "variant": "long",
        "method": "coop",
        "rounds": "9",
        "seed": "2",
        "bytes": "7",
        "test.mAP": "0.7",
    }


def test_results_are_written_as_csv_plots_and_pages_and_repeat_byte_for_byte(tmp_path: Path) -> None:
    outcomes = [(run, {"metrics": {**metrics, "seconds": 20.0}, "prevalence": []}) for run, metrics in rows()]
    for folder in ("first", "second"):
        write_experiment(experiment(), outcomes, tmp_path / folder)
    first = {path.name: path.read_bytes() for path in (tmp_path / "first").iterdir()}
    second = {path.name: path.read_bytes() for path in (tmp_path / "second").iterdir()}
    assert set(first) == {"results.csv", "plot-1.svg", "report.md", "report.html"}
    assert first == second
    ElementTree.fromstring(first["plot-1.svg"])
    page = first["report.md"].decode()
    assert "| long | coop | 9 | 0.600 ± 0.248 |" in page
    assert "9 runs, 3 minutes on one core; mean ± 95 % interval over 3 seeds." in page
    assert "![plot-1](plot-1.svg)" in page
