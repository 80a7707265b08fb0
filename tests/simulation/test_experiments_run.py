"""Experiments from settings to figures, on a tiny CLIP with random weights: mechanics, no accuracy."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from fedmpt.cli import main
from fedmpt.edge_client.cache import FeatureCache
from fedmpt.edge_client.engine import HeadOutput
from fedmpt.simulation.experiments import (
    Experiment,
    ExperimentError,
    Settings,
    metric_names,
    parse_experiment,
)
from fedmpt.simulation.experiments_data import Photos
from fedmpt.simulation.experiments_grid import run_experiment
from fedmpt.simulation.experiments_run import deal, make_sites, measure, perform

REAL_PHOTOS = Path(__file__).parents[2].parent / "shared" / "photos"


def photos_with(logits: np.ndarray, labels: np.ndarray, validation: slice, test: slice) -> Photos:
    """Photos whose tokens are their own logits, for an engine that passes them on."""
    tokens = logits.astype(np.float16)[:, None, :]
    hashes = tuple(f"{index:064x}" for index in range(len(labels)))

    def cache(rows: slice) -> FeatureCache:
        return FeatureCache(tokens[rows], labels[rows].astype(np.int8), hashes[rows], ())

    return Photos(cache(test), np.zeros(0, np.int64), cache(validation), {"test": cache(test)}, ((0, 1),))


class Telling:
    """An engine whose logits are the tokens."""

    def train_step(self, state, tokens, labels):  # type: ignore[no-untyped-def]
        raise NotImplementedError

    def text_features(self, state):  # type: ignore[no-untyped-def]
        return np.zeros((1, 2, 2), np.float32)

    def head(self, state, text, tokens):  # type: ignore[no-untyped-def]
        logits = tokens[:, 0].astype(np.float32)
        return HeadOutput(logits, logits, np.zeros((len(logits), 2, 1), np.float32))


def test_thresholds_come_from_validation_photos_and_not_from_the_test() -> None:
    # On validation, label 1 is present from logit 1 on; on test everything lies 0.5 lower.
    levels = np.linspace(-3, 5, 41)
    logits = np.stack([np.full(82, 3.0), np.concatenate([levels, levels - 0.5])], axis=1)
    labels = np.stack([np.ones(82), np.tile(levels >= 1, 2)], axis=1)
    photos = photos_with(logits, labels, slice(0, 41), slice(41, 82))
    figures = measure(Telling(), {}, photos, [(0, 1)])
    assert figures["test.mAP"] == 1
    assert figures["test.CF1 tuned"] < 1  # the threshold is right for validation, not for test
    # Equal recall: four fifths of validation's positives lie above the threshold, fewer of the test's.
    assert 0.7 < figures["test.recall"] < 0.9 + 0.1
    assert figures["test.spurious activation"] == 0


def test_spurious_activation_counts_the_target_where_only_the_source_is_present() -> None:
    labels = np.array([[1, 1], [1, 1], [1, 0], [1, 0], [0, 0], [0, 1]])
    logits = np.array([[3, 3], [3, 3], [3, 4], [3, -3], [-3, 4], [-3, 3]], np.float64)
    photos = photos_with(logits, labels, slice(0, 6), slice(0, 6))
    figures = measure(Telling(), {}, photos, [(0, 1)])
    assert figures["test.spurious activation"] == 0.5
    # The other pair, (1, 0): label 0 is never predicted on the last photo, which shows label 1 alone.
    assert figures["test.unplanted activation"] == 0


def test_best_of_nine_thresholds_on_the_test_set_flatters() -> None:
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 2, (60, 2))
    logits = labels * 2.0 - 3 + generator.standard_normal((60, 2))
    figures = measure(Telling(), {}, photos_with(logits, labels, slice(0, 30), slice(30, 60)), [])
    assert figures["test.OF1 best of 9"] >= figures["test.OF1"]
    assert math.isnan(figures["test.spurious activation"])


def dealt(**changes: object) -> tuple[Settings, Photos]:
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 2, (120, 2))
    photos = photos_with(labels * 1.0, labels, slice(0, 20), slice(0, 120))
    hashes = tuple(f"{value:064x}" for value in generator.integers(0, 2**62, 120))
    train = FeatureCache(photos.train.tokens, photos.train.labels, hashes, ())
    return Settings(**{"clients": 4, **changes}), Photos(  # type: ignore[arg-type]
        train, np.repeat(np.arange(4), 30), photos.validation, photos.tests, photos.pairs
    )


@pytest.mark.parametrize("partition", ["own", "iid", "dirichlet", "clusters"])
def test_photos_are_dealt_as_the_settings_say(partition: str) -> None:
    shares = deal(*dealt(partition=partition, clusters=2))
    assert len(shares) == 4
    assert sorted(np.concatenate(shares).tolist()) == list(range(120))


def test_one_centre_holds_everything_when_training_is_centralised() -> None:
    settings, photos = dealt(centralised=True)
    assert list(make_sites(settings, photos, deal(settings, photos))) == ["centre"]


def test_a_site_trains_and_validates_on_different_photos() -> None:
    settings, photos = dealt(masked=0.5)
    for site in make_sites(settings, photos, deal(settings, photos)).values():
        assert not set(site.train) & set(site.validation)
        assert len(site.train) + len(site.validation) == 30
        assert 0.3 < (site.labels[site.train] == -1).mean() < 0.7


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"partition": "fair"}, "partition 'fair': choose iid"), ({"unknown": "maybe"}, "unknown = 'maybe'")],
)
def test_an_unknown_choice_is_refused(changes: dict[str, str], message: str) -> None:
    settings, photos = dealt(**changes)
    with pytest.raises(ExperimentError, match=message):
        make_sites(settings, photos, deal(settings, photos))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared by the runs below: bundles are slow to trace."""
    return tmp_path_factory.mktemp("store")


def small(clip: Path, **changes: object) -> dict[str, object]:
    base = {"clip": str(clip), "method": "coop", "photos": 40, "test_photos": 24, "clients": 2, "rounds": 1}
    return {**base, **changes}


def seeds(clip: Path, count: int) -> Experiment:
    document = {"settings": small(clip), "grid": [{"seed": list(range(count))}]}
    return parse_experiment("small", document, "small.toml")


@pytest.mark.slow
def test_a_grid_goes_on_where_it_was_and_runs_the_same_over_processes(
    tiny_clip: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run_experiment(seeds(tiny_clip, 2), store)
    assert [run.settings.seed for run, _ in first] == [0, 1]
    figures = first[0][1]["metrics"]
    assert set(figures) == set(metric_names(first[0][0].settings))
    assert np.shape(first[0][1]["prevalence"]) == (2, 20)

    stages: list[tuple[str, int, int]] = []
    again = run_experiment(seeds(tiny_clip, 3), store, workers=2, report=lambda *stage: stages.append(stage))
    assert again[:2] == first
    assert [stage for stage in stages if stage[0] == "runs"] == [("runs", 1, 1)]
    alone = perform(again[2][0].settings, store)["metrics"]
    assert {**again[2][1]["metrics"], "seconds": 0} == {**alone, "seconds": 0}


@pytest.mark.slow
def test_the_command_writes_the_results_of_an_experiment(
    tiny_clip: Path, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "".join(f"{key} = {value!r}\n" for key, value in small(tiny_clip).items())
    text += '[[grid]]\nseed = [0, 1]\n[[plot]]\nx = "seed"\ny = ["decorrelated.mAP"]\n'
    (tmp_path / "mine.toml").write_text(f"[settings]\n{text}")
    arguments = [
        "simulate",
        str(tmp_path / "mine.toml"),
        "--store",
        str(store),
        "--out",
        str(tmp_path / "out"),
    ]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "decorrelated.mAP" in shown
    assert "nan" not in shown
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"results.csv", "plot-1.svg", "report.md", "report.html"}
    assert len((tmp_path / "out" / "results.csv").read_text().splitlines()) == 3


@pytest.mark.slow
@pytest.mark.skipif(not REAL_PHOTOS.is_dir(), reason=f"no real photographs at {REAL_PHOTOS}")
def test_the_configuration_for_voc_runs_on_real_photos(tiny_clip: Path, store: Path) -> None:
    document = {
        "settings": small(
            tiny_clip, data="voc", root=str(REAL_PHOTOS / "voc"), partition="clusters", clusters=2
        )
    }
    ((_, outcome),) = run_experiment(parse_experiment("voc", document, "voc.toml"), store)
    assert 0 < outcome["metrics"]["test.mAP"] < 1
    assert outcome["metrics"]["divergence"] > 0
