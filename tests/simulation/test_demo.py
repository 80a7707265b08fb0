"""The demo's federations: the shipped one, and others drawn by seed. The whole demo runs in the check script."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedmpt.cli import main
from fedmpt.protocol.manifest import load_manifest, verify_bundle
from fedmpt.simulation.demo import (
    BUNDLE,
    SHARED_SETS,
    SPACE_BYTES,
    DemoError,
    draw_federation,
    run_demo,
    unpack,
)
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


def test_a_disk_that_is_too_full_is_told_at_once(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=SPACE_BYTES - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(DemoError, match="the demo needs 160 MB and 159 MB are free; free some space"):
        run_demo(tmp_path)


def test_what_a_failed_demo_has_written_is_gone_but_for_its_logs(tmp_path):
    def fail(stage, done, total):
        if stage == "photos into features":
            assert (tmp_path / "photos").is_dir()
            raise RuntimeError

    for _ in range(2):  # and they are not in the next demo's way
        with pytest.raises(RuntimeError):
            run_demo(tmp_path, report=fail)
        assert [path.name for path in tmp_path.iterdir()] == ["logs"]


def processes_of(folder):
    """The numbers of all processes whose command line names the folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes()
        except OSError:
            continue
        if str(folder).encode() in command:
            found.append(int(path.parent.name))
    return found


@pytest.mark.slow
def test_a_terminal_that_closes_during_the_rounds_leaves_no_process_and_only_logs(tmp_path):
    out = tmp_path / "out"
    code = "import sys; from fedmpt.cli import main; sys.exit(main())"
    demo = subprocess.Popen(
        [sys.executable, "-c", code, "demo", "--out", str(out)],
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # under nohup it would stay ignored
    )
    try:
        while not (out / "aggregator" / "history.jsonl").exists():
            assert demo.poll() is None
            time.sleep(0.05)
        assert len(processes_of(out)) == 6
        demo.send_signal(signal.SIGHUP)
        assert demo.wait(15) == 130
        assert processes_of(out) == []
        assert [path.name for path in out.iterdir()] == ["logs"]
    finally:
        demo.kill()
        demo.wait()
