"""``fedmpt tag``: results as JSON, CSV or XMP; resumed, explained, and honest about what failed."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedmpt.cli import main
from fedmpt.edge_client.tagger import Tagger
from fedmpt.protocol.tagger_info import TaggerError

FEDMPT = [sys.executable, "-c", "import sys; from fedmpt.cli import main; sys.exit(main())", "tag"]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    Image.new("RGB", (40, 30), (255, 0, 0)).save(folder / "red.png")
    Image.new("RGB", (40, 30), (0, 255, 128)).save(folder / "sea.png")
    Image.new("RGB", (40, 30)).save(folder / "night.png")
    return folder


@pytest.fixture
def tag(colour_tagger: Path):  # type: ignore[no-untyped-def]
    def run(*arguments: object) -> int:
        common = ["tag", "--tagger", str(colour_tagger), "--device", "cpu", "--threads", "2"]
        return main([*common, *(str(argument) for argument in arguments)])

    return run


def found(line: str) -> tuple[str, list[str]]:
    result = json.loads(line)
    return Path(result["path"]).name, [tag["label"] for tag in result["tags"]]


def test_json_lines_in_name_order(tag, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    assert tag(photos) == 0
    output = capsys.readouterr()
    assert [found(line) for line in output.out.splitlines()] == [
        ("night.png", []),
        ("red.png", ["red"]),
        ("sea.png", ["green", "blue"]),
    ]
    assert output.err.splitlines()[-1] == "3 photos tagged, 0 failed"


@pytest.mark.parametrize(
    ("arguments", "many"),
    [
        (["."], True),
        (["red.png", "sea.png"], True),
        (["*.png"], True),
        (["red.png"], False),
        (["x" * 300], True),
        (["--watch", "."], False),
        (["--serve"], False),
    ],
)
def test_all_cores_share_a_photo_only_where_photos_come_one_at_a_time(  # type: ignore[no-untyped-def]
    tag, photos: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], many: bool
) -> None:
    monkeypatch.chdir(photos)
    chosen = []

    def load(*_: object, many: bool) -> Tagger:
        chosen.append(many)
        raise TaggerError("enough")

    monkeypatch.setattr(Tagger, "load", load)
    assert tag(*arguments) == 1
    assert chosen == [many]


def test_csv_has_a_row_per_label(tag, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    odd = photos / 'comma, "quote".png'
    (photos / "red.png").rename(odd)
    assert tag(photos, "--format", "csv") == 0
    rows = list(csv.reader(io.StringIO(capsys.readouterr().out)))
    assert rows == [
        ["path", "label", "probability"],
        [str(odd), "red", "1.000000"],
        [str(photos / "night.png"), "", ""],
        [str(photos / "sea.png"), "green", "1.000000"],
        [str(photos / "sea.png"), "blue", "0.501961"],
    ]


def test_xmp_sidecars_stand_beside_photos_that_stay_as_they_are(tag, photos: Path) -> None:  # type: ignore[no-untyped-def]
    before = {path: hashlib.sha256(path.read_bytes()).digest() for path in photos.iterdir()}
    assert tag(photos, "--format", "xmp") == 0
    assert {path: hashlib.sha256(path.read_bytes()).digest() for path in before} == before
    added = {path.name for path in photos.iterdir() if path not in before}
    assert added == {"red.png.xmp", "sea.png.xmp"}
    assert "<rdf:li>green</rdf:li><rdf:li>blue</rdf:li>" in (photos / "sea.png.xmp").read_text()


def test_nothing_is_written_into_a_service_folder_even_if_it_is_named(  # type: ignore[no-untyped-def]
    tag, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    library = photos.rename(photos.with_name("My.photoslibrary"))
    before = sorted(library.iterdir())
    other = library.with_name("sea.png")
    Image.new("RGB", (40, 30), (0, 255, 128)).save(other)
    assert tag(library, library / "red.png", other, "--format", "xmp") == 0
    assert "1 photos tagged, 0 failed; passed over: 2 My.photoslibrary" in capsys.readouterr().err
    assert tag(library, "--format", "xmp") == 1
    assert "where no sidecars are written" in capsys.readouterr().err
    assert sorted(library.iterdir()) == before
    assert tag(library / "red.png") == 0
    assert found(capsys.readouterr().out)[1] == ["red"]


def test_exclude_leaves_out_what_it_names(tag, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    assert tag(photos, "--exclude", "r*.png", "--exclude", "night.png") == 0
    output = capsys.readouterr()
    assert [found(line) for line in output.out.splitlines()] == [("sea.png", ["green", "blue"])]
    assert "passed over: 1 red.png, 1 night.png" in output.err


def test_a_persons_keywords_stay_in_view(tag, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    Image.new("RGB", (40, 30), (255, 0, 0)).save(tmp_path / "red.png")
    xmp = (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        '<rdf:Description rdf:about="" xmlns:dc="http://purl.org/dc/elements/1.1/"><dc:subject><rdf:Bag>'
        "<rdf:li>Wedding</rdf:li></rdf:Bag></dc:subject></rdf:Description></rdf:RDF></x:xmpmeta>"
    )
    (tmp_path / "red.xmp").write_text(xmp)
    assert tag(tmp_path, "--format", "xmp") == 0
    assert {path.name for path in tmp_path.iterdir()} == {"red.png", "red.xmp"}
    assert (tmp_path / "red.xmp").read_text().count("<rdf:li>Wedding</rdf:li><rdf:li>red</rdf:li>") == 3


def test_lightrooms_sidecar_name_is_an_option(tag, photos: Path) -> None:  # type: ignore[no-untyped-def]
    assert tag(photos / "red.png", "--format", "xmp", "--sidecar", "photo.xmp") == 0
    assert (photos / "red.xmp").exists()


def test_photos_that_would_share_a_sidecar_fail_and_lose_nothing(  # type: ignore[no-untyped-def]
    tag, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (40, 30), (0, 255, 0)).save(photos / "red.jpg")
    assert tag(photos, "--format", "xmp", "--sidecar", "photo.xmp") == 1
    errors = capsys.readouterr().err
    assert f"failed: {photos}/red.jpg: red.png has the same sidecar, red.xmp" in errors
    assert f"failed: {photos}/red.png: red.jpg has the same sidecar, red.xmp" in errors
    assert not (photos / "red.xmp").exists()
    assert (photos / "sea.xmp").exists()


@pytest.mark.skipif(
    not shutil.which("exiftool"), reason="exiftool is not installed (apt-get install exiftool)"
)
def test_the_documented_line_copies_sidecars_into_copies_of_the_photos(  # type: ignore[no-untyped-def]
    tag, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manual = (Path(__file__).parents[2] / "docs" / "tagger.md").read_text()
    line = manual.split("```sh\n")[1].split("```")[0]
    (tmp_path / "photos").mkdir()
    photo = tmp_path / "photos" / "sea.jpg"
    Image.new("RGB", (40, 30), (0, 255, 128)).save(photo)
    subprocess.run(["exiftool", "-q", "-overwrite_original", "-XMP-dc:Subject=holiday", photo], check=True)
    before = photo.read_bytes()
    assert tag(photo, "--format", "xmp") == 0
    subprocess.run(["bash", "-ec", line], cwd=tmp_path, check=True)
    read = ["exiftool", "-json", "-XMP-dc:Subject", "-XMP-lr:HierarchicalSubject", "tagged/sea.jpg"]
    (copied,) = json.loads(subprocess.run(read, cwd=tmp_path, capture_output=True, check=True).stdout)
    assert copied["Subject"] == ["holiday", "green", "blue"]
    assert copied["HierarchicalSubject"] == ["holiday", "green", "blue"]
    assert photo.read_bytes() == before
    with pytest.raises(SystemExit):
        main(["tag", "--help"])
    assert " ".join(line.split()) in " ".join(capsys.readouterr().out.split())


def test_the_help_says_which_programs_read_sidecars_and_how_xmp_runs_go_on(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        main(["tag", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "Lightroom reads sidecars of proprietary raw files only" in text
    assert "exiftool -tagsFromFile %d%f.%e.xmp" in text
    assert "--format xmp has none unless you name one" in text


def test_top_and_min_probability(tag, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    tag(photos / "sea.png", "--top", 1)
    tag(photos / "sea.png", "--min-probability", "0.9")
    tag(photos / "sea.png", "--min-probability", "0")
    labels = [found(line)[1] for line in capsys.readouterr().out.splitlines()]
    assert labels == [["green"], ["green"], ["green", "blue", "red"]]


def test_failures_are_listed_at_the_end_and_give_exit_code_1(  # type: ignore[no-untyped-def]
    tag, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "a.jpg").write_bytes(b"")
    (photos / "b.jpg").write_text("no photo")
    (photos / "notes.txt").touch()
    assert tag(photos, photos / "absent.jpg") == 1
    output = capsys.readouterr()
    assert len(output.out.splitlines()) == 3
    assert output.err.splitlines() == [
        f"failed: {photos}/a.jpg: empty file",
        f"failed: {photos}/b.jpg: not an image that can be read (JPEG, PNG, WEBP, GIF, BMP, TIFF, AVIF, JPEG2000, PPM)",
        f"failed: {photos}/absent.jpg: no such file",
        "3 photos tagged, 3 failed; passed over: 1 .txt",
    ]


def test_a_sidecar_that_cannot_be_merged_fails_that_photo_alone(  # type: ignore[no-untyped-def]
    tag, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "red.png.xmp").write_text("not XML")
    assert tag(photos, "--format", "xmp") == 1
    assert "red.png.xmp: not well-formed XML" in capsys.readouterr().err
    assert (photos / "sea.png.xmp").exists()


def test_names_from_standard_input(colour_tagger: Path, photos: Path) -> None:
    command = [*FEDMPT, "--tagger", str(colour_tagger), "--device", "cpu", "-"]
    for separator in (b"\n", b"\0"):
        names = separator.join(os.fsencode(photos / name) for name in ("sea.png", "red.png")) + separator
        run = subprocess.run(command, input=names, capture_output=True, check=True)
        assert [found(line)[0] for line in run.stdout.decode().splitlines()] == ["sea.png", "red.png"]


def test_a_second_run_adds_only_what_is_new(tag, photos: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    out = tmp_path / "tags.jsonl"
    assert tag(photos, "--out", out) == 0
    first = out.read_text()
    Image.new("RGB", (40, 30), (255, 255, 255)).save(photos / "white.png")
    assert tag(photos, "--out", out) == 0
    assert out.read_text().startswith(first)
    assert [found(line)[0] for line in out.read_text()[len(first) :].splitlines()] == ["white.png"]


def test_an_unfinished_result_is_cut_off_before_going_on(tag, photos: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    out = tmp_path / "tags.csv"
    tag(photos, "--format", "csv", "--out", out)
    whole = out.read_text()
    journal = tmp_path / "tags.csv.journal"
    journal.write_text(
        "".join(journal.read_text().splitlines(keepends=True)[:-1])
    )  # killed before the last note
    assert tag(photos, "--format", "csv", "--out", out) == 0
    assert out.read_text() == whole


def test_results_of_another_run_are_not_overwritten(  # type: ignore[no-untyped-def]
    tag, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "tags.jsonl"
    out.write_text("precious")
    assert tag(photos, "--out", out) == 1
    assert "exists" in capsys.readouterr().err
    assert out.read_text() == "precious"
    out.unlink()
    tag(photos, "--out", out)
    assert tag(photos, "--out", out, "--top", 1) == 1
    assert "other options" in capsys.readouterr().err


def test_sidecars_are_resumed_by_a_journal(tag, photos: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    assert tag(photos, "--format", "xmp", "--journal", tmp_path / "journal") == 0
    (photos / "red.png.xmp").unlink()
    assert tag(photos, "--format", "xmp", "--journal", tmp_path / "journal") == 0
    assert not (photos / "red.png.xmp").exists()


def test_explain_draws_a_heat_map_per_label_found(tag, photos: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    half = np.zeros((60, 60, 3), np.uint8)
    half[:30, :, 1] = 255
    Image.fromarray(half).save(photos / "half.png")
    assert tag(photos, "--explain", tmp_path / "why") == 0
    drawn = sorted(path.name for path in (tmp_path / "why").rglob("*.*"))
    assert drawn == ["half.png.green.png", "red.png.red.png", "sea.png.blue.png", "sea.png.green.png"]
    with Image.open(next((tmp_path / "why").rglob("half.png.green.png"))) as picture:
        drawn_half = np.asarray(picture).astype(int)
    assert drawn_half.shape == (448, 448, 3)
    assert drawn_half[50, :, 0].min() > 100  # heat over the green half
    assert drawn_half[-50, :, 0].max() < 10  # none over the black one


def drawn_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*.png"))


def test_a_photo_with_a_long_name_is_explained_under_a_shorter_one(tag, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    for name in ("猫" * 83 + "1.png", "猫" * 83 + "2.png"):
        Image.new("RGB", (40, 30), (255, 0, 0)).save(tmp_path / name)
    assert tag(tmp_path / "*.png", "--explain", tmp_path / "why") == 0
    drawn = drawn_in(tmp_path / "why")
    assert len(drawn) == 2
    assert all(name.startswith("猫" * 33 + ".") and name.endswith(".red.png") for name in drawn)


def test_a_photo_whose_heat_map_cannot_be_written_is_reported_and_the_run_goes_on(  # type: ignore[no-untyped-def]
    tag, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(photos)
    (tmp_path / "why" / "red.png.red.png").mkdir(parents=True)
    assert tag("red.png", "sea.png", "--explain", tmp_path / "why") == 1
    output = capsys.readouterr()
    assert [found(line)[0] for line in output.out.splitlines()] == ["red.png", "sea.png"]
    assert "failed: red.png: no heat maps: Is a directory" in output.err
    assert drawn_in(tmp_path / "why") == ["red.png.red.png", "sea.png.blue.png", "sea.png.green.png"]


def test_heat_maps_inside_the_tagged_folder_are_not_tagged(tag, photos: Path) -> None:  # type: ignore[no-untyped-def]
    for _ in range(2):
        assert tag(photos, "--explain", photos / "why") == 0
        assert drawn_in(photos / "why") == ["red.png.red.png", "sea.png.blue.png", "sea.png.green.png"]


def test_heat_maps_among_the_photos_are_refused(  # type: ignore[no-untyped-def]
    tag, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for explain in (photos, photos.parent):
        assert tag(photos, "--explain", explain) == 1
        assert "give a folder of its own" in capsys.readouterr().err
    assert len(drawn_in(photos.parent)) == 3


def test_a_named_photo_is_explained_beside_itself(  # type: ignore[no-untyped-def]
    tag, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(photos)
    assert tag("red.png", "--explain", ".") == 0
    assert (photos / "red.png.red.png").exists()


def test_a_finished_run_is_explained_later(tag, photos: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    out = tmp_path / "tags.jsonl"
    assert tag(photos, "--out", out) == 0
    results = out.read_bytes()
    assert tag(photos, "--out", out, "--explain", tmp_path / "why") == 0
    assert out.read_bytes() == results
    assert drawn_in(tmp_path / "why") == ["red.png.red.png", "sea.png.blue.png", "sea.png.green.png"]


def test_heat_maps_that_are_there_are_not_drawn_again(tag, photos: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    run = (photos, "--out", tmp_path / "tags.jsonl", "--explain", tmp_path / "why")
    assert tag(*run) == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "why").rglob("*.png")}
    assert tag(*run) == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "why").rglob("*.png")} == before


def test_watching_what_is_not_there_is_refused(  # type: ignore[no-untyped-def]
    tag, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tag(photos, photos / "absent", "--watch") == 1
    assert "absent: there is nothing to watch" in capsys.readouterr().err


def test_wrong_usage_is_exit_code_2(tag, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    for arguments in (
        (),
        (photos, "--serve"),
        (photos, "--format", "xmp", "--out", "x"),
        (photos, "--top", 0),
        ("-", "--watch"),
    ):
        with pytest.raises(SystemExit) as caught:
            tag(*arguments)
        assert caught.value.code == 2
    assert "give photos to tag, or --serve" in capsys.readouterr().err


def test_watching_tags_what_appears_until_it_is_ended(
    colour_tagger: Path, photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "tags.jsonl"
    command = [*FEDMPT, "--tagger", str(colour_tagger), "--device", "cpu"]
    options = ["--watch", "--out", str(out), "--explain", str(photos / "why")]
    log = tmp_path / "log"
    with log.open("wb") as stderr:
        process = subprocess.Popen([*command, str(photos), *options], stderr=stderr)

    def wait_for(lines: int) -> list[str]:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            text = out.read_text() if out.exists() else ""
            if text.count("\n") >= lines:
                return [found(line)[0] for line in text.splitlines()]
            time.sleep(0.05)
        raise AssertionError(f"no {lines} results within a minute")

    try:
        assert wait_for(3) == ["night.png", "red.png", "sea.png"]
        Image.new("RGB", (40, 30), (255, 255, 255)).save(photos / "white.png")
        assert wait_for(4)[3] == "white.png"
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        assert log.read_text().splitlines()[-1] == "4 photos tagged, 0 failed"
    finally:
        process.kill()
        process.wait()


def test_a_killed_run_ends_up_like_an_undisturbed_one(colour_tagger: Path, tmp_path: Path) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    for index in range(60):
        Image.new("RGB", (300, 300), (4 * index, 255 - 4 * index, 99)).save(folder / f"{index:02}.png")
    command = [*FEDMPT, "--tagger", str(colour_tagger), "--device", "cpu"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run([*command, str(folder), "--out", str(tmp_path / "whole")], check=True, **quiet)  # type: ignore[call-overload]
    out, kills = tmp_path / "killed", 0
    for _ in range(3):
        before = out.stat().st_size if out.exists() else 0
        process = subprocess.Popen([*command, str(folder), "--out", str(out)], **quiet)  # type: ignore[call-overload]
        while process.poll() is None and (not out.exists() or out.stat().st_size <= before):
            time.sleep(0.001)
        process.kill()
        kills += process.wait() == -signal.SIGKILL
        if out.stat().st_size == (tmp_path / "whole").stat().st_size:
            break
    assert kills >= 1
    subprocess.run([*command, str(folder), "--out", str(out)], check=True, **quiet)  # type: ignore[call-overload]
    assert out.read_bytes() == (tmp_path / "whole").read_bytes()
