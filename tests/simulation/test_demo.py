"""The demo's federations: the shipped one, and others drawn by seed. The whole demo runs in the check script."""

import json

import pytest

from fedmpt.cli import main
from fedmpt.protocol.manifest import load_manifest, verify_bundle
from fedmpt.simulation.demo import BUNDLE, SHARED_SETS, DemoError, draw_federation, run_demo, unpack
from fedmpt.simulation.scenes_pack import PACK


def test_a_seed_draws_other_pairs_and_pictures_and_another_order_of_batches(tmp_path):
    stages = []
    bundle, pack = draw_federation(
        tmp_path, 3, lambda stage, done, total: stages.append((stage, done, total))
    )
    assert stages == [("drawing pictures", 0, 1), ("drawing pictures", 1, 1)]
    sites = unpack(pack, tmp_path / "drawn")
    assert unpack(PACK, tmp_path / "shipped") == sites
    drawn, shipped = (
        json.loads((tmp_path / name / "pairs.json").read_text()) for name in ("drawn", "shipped")
    )
    assert drawn != shipped
    assert drawn.keys() == shipped.keys() == set(sites)
    assert all((tmp_path / "drawn" / name / "labels.csv").exists() for name in SHARED_SETS)
    manifest = load_manifest(bundle)
    verify_bundle(bundle, manifest)
    assert manifest.training.seed == 3
    assert manifest.encoder_digest == load_manifest(BUNDLE).encoder_digest


def test_a_folder_that_holds_something_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").touch()
    with pytest.raises(DemoError, match="not empty; remove it or choose another folder with --out"):
        run_demo(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_negative_seed_is_wrong_usage(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["demo", "--seed", "-1", "--out", str(tmp_path / "out")])
    assert "--seed must not be negative" in capsys.readouterr().err
