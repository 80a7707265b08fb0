"""``fedmpt export``: calibrated on validation photos, refused where it would cost too much."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedmpt.cli import main
from fedmpt.edge_client import metrics
from fedmpt.edge_client.cache import build_cache, open_cache
from fedmpt.edge_client.datasets import LabelledPhoto, read_folder
from fedmpt.edge_client.engine import open_engine
from fedmpt.edge_client.labels import LabelRules
from fedmpt.edge_client.probabilities import fit_temperature
from fedmpt.edge_client.tagger import Tagger
from fedmpt.edge_client.tagging import Tagged, tag_photos
from fedmpt.edge_client.trainer import SiteData
from fedmpt.protocol.codec import load_state, save_state
from fedmpt.protocol.manifest import load_manifest


@pytest.fixture(scope="module")
def site(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tuned ``state.safetensors``, 24 ``photos/`` and the ``cache/`` of them.

    A photo has a label where the untuned model says so more than it usually does: easy to rank, not calibrated.
    """
    folder = tmp_path_factory.mktemp("site")
    manifest = load_manifest(tiny_bundle)
    state = load_state(tiny_bundle / "state.safetensors", manifest.state)
    save_state(folder / "state.safetensors", state, {"federation": "farm", "rounds": "7"})
    random = np.random.default_rng(0)
    (folder / "photos").mkdir()
    paths = [folder / "photos" / f"{index:02}.png" for index in range(24)]
    for path in paths:
        cells = Image.fromarray(random.integers(0, 256, (3, 3, 3), np.uint8))
        cells.resize((48, 48), Image.Resampling.BICUBIC).save(path)
    export = ["export", "--bundle", str(tiny_bundle), "--state", str(folder / "state.safetensors")]
    assert main([*export, "--out", str(folder / "plain.onnx")]) == 0
    tagger = Tagger.load(folder / "plain.onnx", "cpu", 1)
    found = tagger.predict(np.stack([tagger.prepare(path) for path in paths])).probabilities
    labels = (found + random.normal(0, 0.1, found.shape) * found.std(0) > np.median(found, 0)).astype(np.int8)
    photos = [LabelledPhoto(path, row) for path, row in zip(paths, labels, strict=True)]
    build_cache(photos, tiny_bundle, folder / "cache", device="cpu", threads=1)
    return folder


@pytest.fixture
def export(tiny_bundle: Path, site: Path, tmp_path: Path):  # type: ignore[no-untyped-def]
    def run(*arguments: object) -> int:
        state, out = site / "state.safetensors", tmp_path / "out" / "tagger.onnx"
        common = ["export", "--bundle", tiny_bundle, "--state", state, "--out", out]
        return main([str(argument) for argument in (*common, *arguments)])

    return run


def test_exports_with_provenance_and_says_that_it_is_not_calibrated(  # type: ignore[no-untyped-def]
    export, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export() == 0
    output = capsys.readouterr()
    assert "4 labels, float32" in output.out
    assert "not calibrated" in output.err
    info = Tagger.load(tmp_path / "out" / "tagger.onnx", "cpu").info
    assert info.provenance == {"federation": "farm", "rounds": "7"}
    assert info.thresholds == (0.5,) * 4


def test_validation_photos_choose_thresholds_and_temperature(export, site: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    assert export("--validation", site / "cache") == 0
    info = Tagger.load(tmp_path / "out" / "tagger.onnx", "cpu").info
    assert len(set(info.thresholds)) == 4
    assert info.temperature != 1
    assert info.measurement.photos == 24
    assert info.measurement.map is not None
    assert info.measurement.map > 0.9
    assert info.measurement.calibration_error_before is not None


def probabilities_of(tagger: Tagger, paths: list[Path]) -> np.ndarray:
    """What a file says of photos, ``[n, C]``, in the order of its labels."""
    results = tag_photos(tagger, paths, min_probability=0.0)
    found = [dict(result.tags) for result in results if isinstance(result, Tagged)]
    return np.array([[tags[label] for label in tagger.info.labels] for tags in found])


@pytest.mark.parametrize("precision", ["float32", "float16", "int8"])
def test_thresholds_and_temperature_are_those_of_the_files_own_answers(  # type: ignore[no-untyped-def]
    export, tiny_bundle: Path, site: Path, tmp_path: Path, precision: str
) -> None:
    photos = ["--photos", site / "photos"] if precision == "int8" else []
    assert export("--validation", site / "cache", "--precision", precision, "--max-loss", 100, *photos) == 0
    cache = open_cache(site / "cache", load_manifest(tiny_bundle))
    tagger = Tagger.load(tmp_path / "out" / "tagger.onnx", "cpu")
    said = probabilities_of(tagger, [Path(path) for path in cache.paths])
    logits = np.log(said / (1 - said))
    # From features rounded to float16, as float32's own calibration takes them, the answers differ a little.
    tolerance = 1e-2 if precision == "float32" else 1e-3
    assert fit_temperature(logits, cache.labels) == pytest.approx(1, rel=tolerance)
    np.testing.assert_allclose(
        tagger.info.thresholds, metrics.best_f1_thresholds(said, cache.labels), atol=tolerance
    )
    before = metrics.expected_calibration_error(
        1 / (1 + np.exp(-logits * tagger.info.temperature)), cache.labels
    )
    assert tagger.info.measurement.calibration_error_before == pytest.approx(before, abs=tolerance)


def test_the_card_says_which_photos_chose_thresholds_and_by_which_rule(  # type: ignore[no-untyped-def]
    export, site: Path, tmp_path: Path
) -> None:
    photos = ("--precision", "int8", "--photos", site / "photos", "--max-loss", 100)
    assert export("--validation", site / "cache", *photos) == 0
    card = (tmp_path / "out" / "model-card.md").read_text()
    assert "chosen on 24 photos of cache (--validation), and the figures are of the same photos" in card
    assert "- Thresholds: those of best F1 for each label\n" in card
    assert "- ranges of int8: found on photos of photos (--photos)\n" in card


def test_the_card_says_which_labels_missed_the_wanted_precision_and_which_no_photo_shows(  # type: ignore[no-untyped-def]
    export, tiny_bundle: Path, site: Path, tmp_path: Path
) -> None:
    paths = sorted((site / "photos").iterdir())
    said = probabilities_of(Tagger.load(site / "plain.onnx", "cpu"), paths)
    labels = np.zeros(said.shape, np.int8)
    labels[said[:, 0].argmin(), 0] = 1  # cat: where the model expects it least
    labels[said[:, 1].argmax(), 1] = 1
    labels[said[:, 2].argmax(), 2] = 1
    photos = [LabelledPhoto(path, row) for path, row in zip(paths, labels, strict=True)]
    build_cache(photos, tiny_bundle, tmp_path / "cache", device="cpu", threads=1)
    assert export("--validation", tmp_path / "cache", "--wanted-precision", "0.9") == 0
    (line,) = [
        line
        for line in (tmp_path / "out" / "model-card.md").read_text().splitlines()
        if line.startswith("- Thresholds: ")
    ]
    assert "the lowest at which a fraction 0.9 of the tags given is right" in line
    assert "no threshold reaches that for cat, which" in line
    assert "0.5 for labels that no photo shows: potted plant" in line


def test_a_wanted_precision_raises_thresholds(export, site: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    thresholds = []
    for wanted in ("0.5", "1.0"):
        assert export("--validation", site / "cache", "--wanted-precision", wanted) == 0
        thresholds.append(np.array(Tagger.load(tmp_path / "out" / "tagger.onnx", "cpu").info.thresholds))
    assert (thresholds[1] >= thresholds[0]).all()
    assert (thresholds[1] > thresholds[0]).any()


@pytest.mark.parametrize("precision", ["float16", "int8"])
def test_what_a_precision_costs_is_measured_and_written(  # type: ignore[no-untyped-def]
    export, site: Path, tmp_path: Path, precision: str
) -> None:
    photos = ["--photos", site / "photos"] if precision == "int8" else []
    assert export("--validation", site / "cache", "--precision", precision, "--max-loss", 30, *photos) == 0
    info = Tagger.load(tmp_path / "out" / "tagger.onnx", "cpu").info
    assert info.precision == precision
    assert info.measurement.cost is not None
    assert info.measurement.map is not None
    reference = float((info.measurement.reference or "").split()[0])
    assert 100 * (info.measurement.map + info.measurement.cost) == pytest.approx(reference, abs=0.006)


def test_a_precision_that_costs_too_much_is_refused(  # type: ignore[no-untyped-def]
    export, site: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export("--validation", site / "cache", "--precision", "float16", "--max-loss", -100) == 1
    assert "more than --max-loss -100; nothing was written" in capsys.readouterr().err
    assert not (tmp_path / "out" / "tagger.onnx").exists()


@pytest.mark.parametrize(("precision", "limit"), [("float16", "0.3"), ("int8", "1")])
def test_no_more_than_the_stated_points_may_be_lost_by_default(  # type: ignore[no-untyped-def]
    export,
    tiny_bundle: Path,
    site: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    precision: str,
    limit: str,
) -> None:
    base = np.random.default_rng(5).integers(0, 256, (48, 48, 3), np.uint8)
    paths = [tmp_path / f"{index:02}.png" for index in range(24)]
    for index, path in enumerate(paths):
        nearly = base.copy()
        nearly[index, index] ^= 1  # only float32 tells these photos apart
        Image.fromarray(nearly).save(path)
    said = probabilities_of(Tagger.load(site / "plain.onnx", "cpu"), paths)
    labels = (said > np.median(said, axis=0)).astype(np.int8)
    photos = [LabelledPhoto(path, row) for path, row in zip(paths, labels, strict=True)]
    build_cache(photos, tiny_bundle, tmp_path / "cache", device="cpu", threads=1)
    ranges = ["--photos", site / "photos"] if precision == "int8" else []
    assert export("--validation", tmp_path / "cache", "--precision", precision, *ranges) == 1
    assert f"more than --max-loss {limit}; nothing was written" in capsys.readouterr().err


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two rounds of a federation of two sites on the shipped pictures: ``state.safetensors`` and ``validation/``."""
    from fedmpt.aggregator.settings import FederationSettings, RoundSettings, StrategySettings
    from fedmpt.simulation.demo import BUNDLE
    from fedmpt.simulation.scenes_pack import unpack_demo
    from fedmpt.simulation.simulator import simulate

    folder = tmp_path_factory.mktemp("trained")
    manifest = load_manifest(BUNDLE)
    pictures = unpack_demo(folder / "pictures")
    for name in ("clients/client-1", "clients/client-2", "validation"):
        photos = read_folder(pictures / name, LabelRules(manifest.labels))
        build_cache(photos, BUNDLE, folder / Path(name).name, device="cpu")
    sites = {}
    for name in ("client-1", "client-2"):
        cache = open_cache(folder / name, manifest)
        sites[name] = SiteData(cache.tokens, cache.labels, *cache.split())
    settings = FederationSettings("test", RoundSettings(rounds=2, calibrate=True), StrategySettings())
    initial = load_state(BUNDLE / "state.safetensors", manifest.state)
    state = simulate(open_engine(BUNDLE, "onnx", "cpu"), manifest, initial, sites, settings).state
    save_state(folder / "state.safetensors", state, {"federation": "test"})
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "points"), [("float16", 0.3), ("int8", 1.0)])
def test_a_trained_model_loses_no_more_than_promised(trained: Path, precision: str, points: float) -> None:
    from fedmpt.simulation.demo import BUNDLE

    out = trained / f"{precision}.onnx"
    arguments = ["--bundle", BUNDLE, "--state", trained / "state.safetensors", "--out", out]
    arguments += ["--validation", trained / "validation", "--precision", precision]
    if precision == "int8":
        arguments += ["--photos", trained / "pictures" / "clients" / "client-1"]
    assert main(["export", *map(str, arguments), "--max-loss", "100"]) == 0
    measurement = Tagger.load(out, "cpu").info.measurement
    assert measurement.map is not None
    assert measurement.map > 0.7
    assert measurement.cost is not None
    assert 100 * measurement.cost <= points


def test_photos_that_moved_cannot_be_measured(  # type: ignore[no-untyped-def]
    export, tiny_bundle: Path, site: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(site / "photos", tmp_path / "photos")
    photos = [LabelledPhoto(path, np.ones(4, np.int8)) for path in (tmp_path / "photos").iterdir()]
    build_cache(photos, tiny_bundle, tmp_path / "cache", device="cpu", threads=1)
    shutil.rmtree(tmp_path / "photos")
    assert export("--validation", tmp_path / "cache", "--precision", "float16") == 1
    assert "none of the validation cache's photos is where it was" in capsys.readouterr().err


def test_unreadable_photos_are_left_out_of_the_ranges(  # type: ignore[no-untyped-def]
    export, site: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(site / "photos", tmp_path / "photos")
    (tmp_path / "photos" / "bad.png").write_text("no photo")
    common = ["--validation", site / "cache", "--precision", "int8", "--max-loss", 100]
    assert export(*common, "--photos", tmp_path / "photos") == 0
    assert "left out: " in capsys.readouterr().err
    shutil.rmtree(tmp_path / "photos")
    assert export(*common, "--photos", tmp_path / "photos") == 1
    assert "no photo in it can be read" in capsys.readouterr().err


def test_evaluating_on_photos_that_chose_the_thresholds_warns(
    tiny_bundle: Path, site: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    random = np.random.default_rng(9)
    for index in range(3):
        Image.fromarray(random.integers(0, 256, (48, 48, 3), np.uint8)).save(tmp_path / f"{index}.png")
    photos = [LabelledPhoto(path, np.ones(4, np.int8)) for path in sorted(tmp_path.glob("*.png"))]
    others = [LabelledPhoto(path, np.ones(4, np.int8)) for path in sorted((site / "photos").iterdir())[:2]]
    build_cache(photos, tiny_bundle, tmp_path / "apart", device="cpu", threads=1)
    build_cache(photos + others, tiny_bundle, tmp_path / "overlapping", device="cpu", threads=1)
    evaluate = ["evaluate", "--bundle", tiny_bundle, "--validation", site / "cache", "--cache"]
    assert main([*map(str, evaluate), str(tmp_path / "overlapping")]) == 0
    assert "warning: 2 of the 5 photos of" in capsys.readouterr().err
    assert main([*map(str, evaluate), str(tmp_path / "apart")]) == 0
    assert "warning" not in capsys.readouterr().err


def test_json_is_the_files_description(
    export, site: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # type: ignore[no-untyped-def]
    assert export("--json") == 0
    description = json.loads(capsys.readouterr().out)
    assert description["labels"] == list(Tagger.load(tmp_path / "out" / "tagger.onnx", "cpu").info.labels)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--precision", "float16"], "needs --validation"),
        (["--precision", "int8", "--validation", "x"], "need each other"),
        (["--photos", "x"], "need each other"),
        (["--wanted-precision", "0.9"], "needs --validation"),
        (["--wanted-precision", "1.5", "--validation", "x"], "at most 1"),
    ],
)
def test_wrong_usage_is_exit_code_2(  # type: ignore[no-untyped-def]
    export, capsys: pytest.CaptureFixture[str], arguments: list[str], complaint: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        export(*arguments)
    assert caught.value.code == 2
    assert complaint in capsys.readouterr().err
