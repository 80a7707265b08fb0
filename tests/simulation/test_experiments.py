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

from fedmpt.export.methods import METHODS
from fedmpt.simulation import report
from fedmpt.simulation.experiments import (
    SHIPPED,
    Experiment,
    ExperimentError,
    load_experiment,
    parse_experiment,
    shown_value,
)
from fedmpt.simulation.experiments_report import (
    METHOD_COLOURS,
    Rows,
    difference_rows,
    draw_plot,
    estimate,
    paired,
    read_results,
    report_blocks,
    report_text,
    results_csv,
    summarise,
    write_experiment,
)

RESULTS = Path(__file__).parents[2] / "docs" / "results"

DOCUMENT: dict[str, Any] = {
    "title": "Strength",
    "question": "Does it help?",
    "settings": {"rounds": 3, "strength": 0},
    "grid": [
        {"method": ["coop", "zero-shot"], "seed": [0, 1, 2]},
        {"variant": "long", "method": "coop", "rounds": 9, "seed": [0, 1, 2]},
    ],
    "plot": [{"x": "method", "y": ["decorrelated.mAP"], "by": "variant"}],
}


def experiment(**changes: Any) -> Experiment:
    return parse_experiment("strength", {**DOCUMENT, **changes}, "strength.toml")


def rows() -> Rows:
    return [
        (run, {"decorrelated.mAP": 0.5 + run.settings.seed / 10, "bytes per update": 290415.25})
        for run in experiment().runs
    ]


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
    plots = [{"x": "seed", "y": ["decorrelated.mAP"], "by": ["method", "rounds"], "only": ""}]
    svg = draw_plot(experiment(plot=plots).plots[0], rows())
    assert "coop, 3" in svg
    assert "zero-shot, 3" in svg
    assert "coop, 9" not in svg


def test_tables_have_the_fields_that_tell_runs_apart_and_not_what_follows_from_them() -> None:
    assert experiment().differing == ("variant", "method", "rounds")
    assert experiment().varying == ("variant", "method")
    grid = [{"variant": "all", "strength": [0.5, 0.9]}, {"variant": "one", "clients": 1, "strength": 0.95}]
    assert experiment(grid=grid).varying == ("variant", "strength")


@pytest.mark.parametrize(
    ("field", "value", "shown"),
    [
        ("pooling", "", "–"),
        ("tau", 0.0, "–"),
        ("iterations", 0, "–"),
        ("tau", 4.0, "4"),
        ("strength", 0.0, "0"),
        ("dropout", 0.0, "0"),
        ("calibrate", False, "no"),
        ("method", "coop", "coop"),
    ],
)
def test_a_setting_that_the_preset_decides_is_shown_as_a_dash(field: str, value: object, shown: str) -> None:
    assert shown_value(field, value) == shown


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
        (
            {"plot": [{"x": "strength", "y": ["nonsense.mAP"]}]},
            r"y: unknown metric 'nonsense.mAP'; known: decorrelated.mAP, .*seconds",
        ),
        ({"plot": [{"x": "strength", "y": ["test.mAP"]}]}, "unknown metric 'test.mAP'"),
        ({"compare": [{"against": {"metod": "coop"}}]}, r"\[\[compare\]\]: unknown key 'metod'"),
        ({"compare": [{"against": {"method": "coop"}}]}, "several runs of one seed match"),
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
    summary = summarise(rows(), ["method", "rounds"], "decorrelated.mAP")
    assert set(summary) == {("coop", 3), ("zero-shot", 3), ("coop", 9)}
    assert summary["coop", 9].count == 3
    assert summary["coop", 9].mean == pytest.approx(0.6)


def test_differences_are_paired_by_seed() -> None:
    document = {"compare": [{"against": {"method": "coop", "variant": ""}, "y": ["decorrelated.mAP"]}]}
    compared = experiment(**document)
    gains = {"zero-shot": (-0.2, -0.1, -0.3), "coop": (0.1, 0.1, 0.1)}
    rows = [
        # What seeds have in common is much larger than what methods gain.
        (
            run,
            {
                "decorrelated.mAP": float(seed)
                + (gains[method][seed] if run.variant or method != "coop" else 0)
            },
        )
        for run in compared.runs
        for seed, method in [(run.settings.seed, run.settings.method)]
    ]
    found = paired(compared.comparisons[0], rows, compared.varying, "decorrelated.mAP")
    assert set(found) == {("", "zero-shot"), ("long", "coop")}
    difference = found["", "zero-shot"]
    assert difference.mean == pytest.approx(-0.2)
    assert difference.p_value == pytest.approx(ttest_1samp([-0.2, -0.1, -0.3], 0).pvalue)
    assert difference_rows(compared, compared.comparisons[0], rows) == [
        ["–", "zero-shot", "-0.2000 ± 0.2484 (p 0.074)"],
        ["long", "coop", "+0.1000 ± 0.0000 (p < 0.001)"],
    ]


def test_a_method_has_one_colour_whatever_else_a_plot_shows() -> None:
    plots = [{"x": "seed", "y": ["decorrelated.mAP"], "by": "method", "only": name} for name in ("", "long")]
    both, one = (draw_plot(plot, rows()) for plot in experiment(plot=plots).plots)
    assert METHOD_COLOURS["coop"] in both
    assert METHOD_COLOURS["coop"] in one
    assert METHOD_COLOURS["zero-shot"] not in one
    assert set(METHOD_COLOURS) == set(METHODS)


def test_the_csv_has_one_row_per_run_with_settings_and_metrics() -> None:
    records = list(csv.DictReader(io.StringIO(results_csv(experiment(), rows()))))
    assert len(records) == 9
    assert records[-1] == {
        "variant": "long",
        "method": "coop",
        "rounds": "9",
        "seed": "2",
        "bytes per update": "290415.25",
        "decorrelated.mAP": "0.7",
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
    assert "| long | coop | 0.600 ± 0.248 |" in page
    assert "Settings that follow from those shown are in results.csv: rounds." in page
    assert "9 runs, 3 minutes on one core; mean ± 95 % interval over 3 seeds." in page
    assert "![plot-1](plot-1.svg)" in page


def test_results_are_read_back_and_must_be_of_the_same_runs() -> None:
    text = results_csv(experiment(), rows())
    assert read_results(experiment(), text) == rows()
    other = experiment(settings={"rounds": 4})
    with pytest.raises(
        ExperimentError, match=r"results\.csv does not hold the runs of the experiment's file"
    ):
        read_results(other, text)


@pytest.mark.parametrize(
    "folder", sorted(path.parent for path in RESULTS.glob("*/results.csv")), ids=lambda folder: folder.name
)
def test_a_committed_report_says_what_its_file_and_its_csv_say(folder: Path) -> None:
    shipped = load_experiment(folder.name)
    found = read_results(shipped, (folder / "results.csv").read_text())
    names = [f"plot-{index}.svg" for index in range(1, len(shipped.plots) + 1)]
    drawings = {
        name: (folder / name).read_text() for name in (*names, "clients.svg") if (folder / name).exists()
    }
    assert set(names) <= set(drawings)
    assert (folder / "report.md").read_text() == report_text(shipped, found, drawings)
    page = (folder / "report.html").read_text()
    assert page == report.page(shipped.title, report_blocks(shipped, found, drawings))
