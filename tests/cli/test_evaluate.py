"""``fedmpt evaluate`` on a cache of the bundle's own encoder."""

import json

import numpy as np
import pytest
from PIL import Image

from fedmpt.cli import main
from fedmpt.simulation.demo import BUNDLE


@pytest.fixture(scope="module")
def caches(tiny_bundle, tmp_path_factory):
    """A test and a validation cache of random photos."""
    folder = tmp_path_factory.mktemp("evaluate")
    random = np.random.default_rng(0)
    for name in ("test", "validation"):
        photos = folder / f"{name}-photos"
        photos.mkdir()
        rows = ["path,labels"]
        for i in range(12):
            Image.fromarray(random.integers(0, 256, (50, 50, 3), np.uint8)).save(photos / f"{i}.png")
            rows.append(f"{i}.png," + ";".join(label for label in ("cat", "dog") if random.random() < 0.5))
        (photos / "labels.csv").write_text("\n".join(rows) + "\n")
        assert main(["cache", str(photos), "--bundle", str(tiny_bundle), "--out", str(folder / name)]) == 0
    return folder


def fedmpt_evaluate(bundle, caches, *options):
    return main(
        [
            "evaluate",
            "--bundle",
            str(bundle),
            "--cache",
            str(caches / "test"),
            "--threads",
            "1",
            *map(str, options),
        ]
    )


def test_prints_the_figures_of_the_initial_state(tiny_bundle, caches, capsys):
    assert fedmpt_evaluate(tiny_bundle, caches) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "photos: 12"
    assert lines[1].startswith("mAP: 0.")
    assert "  traffic light: no photo shows it" in lines
    assert not any(line.startswith("spurious") for line in lines)


def test_prints_json_with_thresholds_from_validation_photos(tiny_bundle, caches, capsys, tmp_path):
    (tmp_path / "pairs.json").write_text('[["cat", "dog"]]')
    options = ("--validation", caches / "validation", "--pairs", tmp_path / "pairs.json", "--json")
    assert fedmpt_evaluate(tiny_bundle, caches, *options) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["photos"] == 12
    assert figures["spurious_pairs"] == [["cat", "dog"]]
    assert 0 <= figures["spurious_activation"] <= 1
    assert 0 < figures["of1_tuned"] <= 1
    assert figures["average_precision"]["potted plant"] is None


def test_a_state_of_another_bundle_is_refused(tiny_bundle, caches, capsys):
    state = BUNDLE / "state.safetensors"
    assert fedmpt_evaluate(tiny_bundle, caches, "--state", state) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"fedmpt evaluate: {state}: ")
    assert error.endswith("Is it a state that was tuned with this bundle?\n")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[["cat", "zebra"]]', "'zebra' is not a label of the bundle"),
        ('[["cat"]]', "not a JSON list of label pairs"),
        ("{", "not a JSON list of label pairs"),
        ("[3]", "not a JSON list of label pairs"),
    ],
)
def test_malformed_pairs_are_refused(tiny_bundle, caches, tmp_path, capsys, content, message):
    (tmp_path / "pairs.json").write_text(content)
    options = ("--validation", caches / "validation", "--pairs", tmp_path / "pairs.json")
    assert fedmpt_evaluate(tiny_bundle, caches, *options) == 1
    assert message in capsys.readouterr().err


def test_pairs_without_validation_are_wrong_usage(tiny_bundle, caches, tmp_path):
    with pytest.raises(SystemExit) as caught:
        fedmpt_evaluate(tiny_bundle, caches, "--pairs", tmp_path / "pairs.json")
    assert caught.value.code == 2
