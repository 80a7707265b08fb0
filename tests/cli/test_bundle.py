"""``fedmpt bundle`` builds a bundle and says what a site downloads, keeps and sends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedmpt.cli import main
from fedmpt.cli.bundle import describe, read_lines, summarise
from fedmpt.protocol.errors import FedmptError
from fedmpt.protocol.manifest import BundleManifest, Pooling, load_manifest, verify_bundle


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    path = tmp_path / "labels.txt"
    path.write_text("cat\ndog\n")
    return path


def test_a_bundle_is_built_from_files(
    tiny_clip: Path, labels: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = labels.with_name("bundle")
    words = ["--clip", str(tiny_clip), "--labels", str(labels), "--out", str(out)]
    more = ["--method", "zero-shot", "--preset", "paper", "--batch-size", "2", "--seed", "7", "--json"]
    assert main(["bundle", *words, *more]) == 0
    manifest = load_manifest(out)
    verify_bundle(out, manifest)
    assert manifest.labels == ("cat", "dog")
    assert (manifest.training.seed, manifest.training.batch_size, manifest.pooling.reg) == (7, 2, 0.2)
    printed = json.loads(capsys.readouterr().out)
    assert printed["digest"] == manifest.digest
    assert printed["parameters"] == {"bias": 1, "scale": 1}


@pytest.fixture(scope="module")
def chosen(tiny_clip: Path, tmp_path_factory: pytest.TempPathFactory) -> BundleManifest:
    """Of a bundle for which every number was chosen on the command line."""
    folder = tmp_path_factory.mktemp("chosen")
    (folder / "labels.txt").write_text("cat\ndog\n")
    files = [
        "--clip",
        str(tiny_clip),
        "--labels",
        str(folder / "labels.txt"),
        "--out",
        str(folder / "bundle"),
    ]
    numbers = (
        "--tau 2 --reg 0.05 --iterations 3 --condition-context 5 --class-context 7 --rank 6 --batch-size 2"
    )
    assert main(["bundle", *files, "--method", "fedmpt-full", *numbers.split()]) == 0
    return load_manifest(folder / "bundle")


def test_the_numbers_of_the_pooling_can_be_chosen(chosen: BundleManifest) -> None:
    assert chosen.pooling == Pooling("transport", tau=2, reg=0.05, iterations=3)


def test_the_lengths_of_the_contexts_can_be_chosen(chosen: BundleManifest) -> None:
    assert chosen.state["condition_context"].shape == (5, 5, 32)
    assert chosen.state["class_context"].shape == (7, 32)


def test_the_rank_of_adapters_and_gate_can_be_chosen(chosen: BundleManifest) -> None:
    assert chosen.state["adapter_down"].shape == (5, 6, 24)
    assert chosen.state["gate_down"].shape == (6, 24)


def test_the_summary_counts_parameters_and_bytes(tiny_bundle: Path) -> None:
    summary = summarise(load_manifest(tiny_bundle), tiny_bundle)
    assert summary["parameters"] == {
        "bias": 1,
        "class_context": 4 * 32,
        "condition_context": 3 * 4 * 32,
        "scale": 1,
    }
    assert summary["trained_parameters"] == 514
    assert summary["update_bytes"] == {"float32": 2056, "float16": 1028, "int8": 514}
    assert summary["cached_bytes_per_photo"] == 2 * 10 * 24
    text = describe(summary)
    assert (
        "trained 514 parameters; an update is 2,056 bytes in float32, 1,028 in float16, 514 in int8" in text
    )
    assert "fedmpt-prompts, 4 labels, 3 conditions" in text
    assert "text_weights.safetensors" in text


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--clip", "nowhere"], "nowhere: no such folder; give a CLIPModel folder or a hub name"),
        (["--preset", "best"], "preset 'best' is unknown; choose one of default, paper"),
        (["--method", "magic"], "method 'magic' is unknown; choose one of fedmpt-prompts, fedmpt-full"),
        (["--batch-size", "0"], "batch size is 0; it must be above 0"),
        (["--tau", "0"], "tau is 0.0; it must be above 0"),
        (["--tau", "inf"], "tau is inf; it must be above 0 and finite"),
        (["--reg", "nan"], "reg is nan; it must be above 0"),
        (["--iterations", "0"], "iterations is 0; it must be above 0"),
        (["--condition-context", "0"], "condition context is 0; it must be above 0"),
        (
            ["--class-context", "70"],
            "the text tower takes 77; shorten the label, the conditions or the contexts",
        ),
        (["--rank", "-1"], "adapter rank is -1; it must be above 0"),
    ],
)
def test_a_wrong_option_is_named(
    tiny_clip: Path, labels: Path, capsys: pytest.CaptureFixture[str], words: list[str], text: str
) -> None:
    out = labels.with_name("bundle")
    given = ["--clip", str(tiny_clip), "--labels", str(labels), "--out", str(out), *words]
    assert main(["bundle", *given]) == 1
    assert text in capsys.readouterr().err
    assert not out.exists()


def test_label_files_may_hold_comments_and_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "labels.txt"
    path.write_bytes("\ufeff# VOC\ncat\n\n  dog \r\nKüche\n".encode())
    assert read_lines(path) == ["cat", "dog", "Küche"]


def test_an_unreadable_label_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "labels.txt"
    with pytest.raises(FedmptError, match=r"labels\.txt: cannot be read as UTF-8 text"):
        read_lines(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FedmptError, match=r"labels\.txt: cannot be read as UTF-8 text"):
        read_lines(path)
