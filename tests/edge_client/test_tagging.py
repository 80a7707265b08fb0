"""Many photos: found, tagged in order, resumed after a kill, watched."""

from __future__ import annotations

import itertools
import json
import os
import threading
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fedmpt.edge_client.images import PhotoError
from fedmpt.edge_client.tag_journal import Journal, JournalError
from fedmpt.edge_client.tag_results import json_line
from fedmpt.edge_client.tagger import Prediction, Tagger
from fedmpt.edge_client.tagging import Tagged, find_photos, tag_photos, watch


@pytest.fixture(scope="module", params=[False, True], ids=["one-batch", "two-batches"])
def tagger(colour_tagger: Path, request: pytest.FixtureRequest) -> Tagger:
    """Computes one batch at a time, or two."""
    many = bool(request.param)
    tagger = Tagger.load(colour_tagger, "cpu", threads=2 if many else 1, many=many)
    assert tagger.streams == 1 + many
    return tagger


def photo(path: Path, red: int = 255, green: int = 0, blue: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 40), (red, green, blue)).save(path)
    return path


# Finding


def test_folders_are_searched_with_all_below_in_name_order(tmp_path: Path) -> None:
    wanted = [photo(tmp_path / name) for name in ("a.jpg", "b/a.PNG", "b/ü/c.webp", "c.jpeg")]
    assert list(find_photos([str(tmp_path)])) == wanted


def test_what_is_no_photo_is_passed_over_and_counted(tmp_path: Path) -> None:
    kept = photo(tmp_path / "a.jpg")
    photo(tmp_path / ".hidden.jpg")
    photo(tmp_path / ".thumbnails" / "a.jpg")
    for name in ("a.jpg.xmp", "b.xmp", "clip.mov", "README"):
        (tmp_path / name).touch()
    skipped: Counter[str] = Counter()
    assert list(find_photos([str(tmp_path)], skipped)) == [kept]
    assert skipped == {".xmp": 2, ".mov": 1, "": 1}


def test_glob_patterns_that_the_shell_left_are_expanded(tmp_path: Path) -> None:
    inside, outside = photo(tmp_path / "a" / "x.jpg"), photo(tmp_path / "y.jpg")
    photo(tmp_path / "z.png")
    assert list(find_photos([str(tmp_path / "**" / "*.jpg")])) == [inside, outside]


SERVICE = ("2024/@eaDir/a.jpg/thumb.jpg", "#recycle/a.jpg", "@Recycle/a.jpg", "$RECYCLE.BIN/S-1/a.jpg")
SERVICE += (
    "System Volume Information/a.jpg",
    "My.photoslibrary/originals/a.jpg",
    "Catalog Previews.lrdata/a.jpg",
)


@pytest.mark.parametrize("pattern", ["", "**/*.jpg", "*", "*/*.jpg", "*/*/*.jpg", "*/*/*/*.jpg"])
def test_service_folders_and_insides_of_libraries_are_left_out(tmp_path: Path, pattern: str) -> None:
    for name in SERVICE:
        photo(tmp_path / name)
    kept = {
        photo(tmp_path / name) for name in ("2024/a.jpg", "2024/05/a.jpg", "2024/05/01/a.jpg", "eaDir/a.jpg")
    }
    found = set(find_photos([str(tmp_path / pattern)]))
    assert found
    assert found <= kept
    assert found == kept or pattern.endswith("*/*.jpg")


def test_what_is_left_out_is_counted_by_name(tmp_path: Path) -> None:
    for name in SERVICE:
        photo(tmp_path / name)
    skipped: Counter[str] = Counter()
    assert list(find_photos([str(tmp_path)], skipped)) == []
    assert skipped == dict.fromkeys(
        (Path(name).parts[1 if name.startswith("2024") else 0] for name in SERVICE), 1
    )


def test_what_a_pattern_names_and_is_left_out_is_counted_by_the_folder(tmp_path: Path) -> None:
    photo(tmp_path / "@eaDir" / "a.jpg")
    photo(tmp_path / "@eaDir" / "b.jpg")
    skipped: Counter[str] = Counter()
    assert list(find_photos([str(tmp_path / "*" / "*.jpg")], skipped)) == []
    assert skipped == {"@eaDir": 2}


def test_files_and_folders_can_be_excluded_by_name(tmp_path: Path) -> None:
    kept = photo(tmp_path / "a" / "b.jpg")
    for name in ("a/c-small.jpg", "private/d.jpg", "a/private/e.jpg"):
        photo(tmp_path / name)
    skipped: Counter[str] = Counter()
    assert list(find_photos([str(tmp_path)], skipped, exclude=["private", "*-small.*"])) == [kept]
    assert list(find_photos([f"{tmp_path}/**/*.jpg"], exclude=["private", "*-small.*"])) == [kept]
    assert skipped == {"private": 2, "c-small.jpg": 1}


def test_a_file_whose_name_looks_like_a_pattern_is_itself(tmp_path: Path) -> None:
    odd = photo(tmp_path / "a[1].jpg")
    photo(tmp_path / "a1.jpg")
    assert list(find_photos([str(odd)])) == [odd]


def test_a_named_file_is_tried_whatever_it_is_called(tmp_path: Path) -> None:
    names = [str(tmp_path / "photo"), str(tmp_path / "absent.jpg")]
    assert [str(path) for path in find_photos(names)] == names


def test_symlink_loops_end(tmp_path: Path) -> None:
    kept = photo(tmp_path / "a.jpg")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "broken.jpg").symlink_to(tmp_path / "absent")
    assert list(find_photos([str(tmp_path)])) == [kept, tmp_path / "broken.jpg"]


def test_a_link_that_leads_nowhere_is_reported_and_ends_nothing(tagger: Tagger, tmp_path: Path) -> None:
    first, last = photo(tmp_path / "a.jpg"), photo(tmp_path / "z.jpg")
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    results = list(tag_photos(tagger, find_photos([str(tmp_path)])))
    assert [result.path for result in results] == [first, loop, last]
    assert isinstance(results[1], PhotoError)
    assert "symbolic links" in results[1].reason


@pytest.mark.parametrize("pattern", ["**/*.jpg", "**", "*/**/*.jpg", "**/**/*.jpg", "**/sub/*.jpg"])
def test_glob_patterns_end_in_loops_of_links_and_give_each_photo_once(tmp_path: Path, pattern: str) -> None:
    kept = photo(tmp_path / "sub" / "a.jpg")
    (tmp_path / "sub" / "loop").symlink_to(".")
    (tmp_path / "sub" / "up").symlink_to("..")
    assert list(find_photos([str(tmp_path / pattern)])) == [kept]


def test_a_pattern_reports_what_it_cannot_look_into(tmp_path: Path) -> None:
    kept, loop = photo(tmp_path / "a.jpg"), tmp_path / "loop"
    loop.symlink_to(loop)
    assert list(find_photos([str(tmp_path / "**" / "*.jpg")])) == [kept, loop]


def test_heic_photos_are_not_passed_over_but_fail_with_advice(tagger: Tagger, tmp_path: Path) -> None:
    (tmp_path / "phone.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
    (result,) = tag_photos(tagger, find_photos([str(tmp_path)]))
    assert isinstance(result, PhotoError)
    assert "convert it to JPEG" in result.reason


# Tagging


def test_photos_that_failed_do_not_stay_in_memory(tagger: Tagger, tmp_path: Path) -> None:
    path = tmp_path / "no photo.jpg"
    with path.open("wb") as file:
        file.truncate(4 << 20)
    tracemalloc.start()
    failed = list(tag_photos(tagger, [path] * 50, workers=1))
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(failed) == 50
    assert kept < 4 << 20


def test_results_come_in_the_order_of_the_photos(tagger: Tagger, tmp_path: Path) -> None:
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 0, 0), (255, 255, 0)]
    paths = [photo(tmp_path / f"{index}.png", *each) for index, each in enumerate(colours)]
    Image.new("RGB", (3000, 3000), colours[0]).save(paths[0])  # ready long after the others
    results = list(tag_photos(tagger, paths, batch_size=2, workers=3))
    assert [result.path for result in results] == paths
    labels = [[label for label, _ in result.tags] for result in results if isinstance(result, Tagged)]
    assert labels == [["red"], ["green"], ["blue"], [], ["red", "green"]]


def test_bad_photos_are_reported_in_place_and_end_nothing(tagger: Tagger, tmp_path: Path) -> None:
    good = photo(tmp_path / "good.png")
    truncated, empty = tmp_path / "truncated.png", tmp_path / "empty.jpg"
    truncated.write_bytes(good.read_bytes()[:60])
    empty.touch()
    text = tmp_path / "text.jpg"
    text.write_text("not a photo")
    paths = [truncated, empty, good, text, tmp_path / "absent.jpg", tmp_path, good]
    results = list(tag_photos(tagger, paths, batch_size=3))
    assert [isinstance(result, PhotoError) for result in results] == [
        True,
        True,
        False,
        True,
        True,
        True,
        False,
    ]
    assert [result.path for result in results] == paths


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_a_photos_result_does_not_depend_on_its_batch(
    tagger: Tagger, tmp_path: Path, batch_size: int
) -> None:
    paths = [photo(tmp_path / f"{index}.png", 20 * index, 255 - 20 * index, 7 * index) for index in range(10)]
    alone = [tagger.tag(path) for path in paths]
    results = tag_photos(tagger, paths, batch_size=batch_size)
    assert [result.tags for result in results if isinstance(result, Tagged)] == alone


def test_heat_maps_come_with_the_labels_that_were_found(tagger: Tagger, tmp_path: Path) -> None:
    half = Image.new("RGB", (32, 32))
    half.paste((255, 0, 0), (0, 0, 32, 16))
    half.save(tmp_path / "half.png")
    (result,) = tag_photos(tagger, [tmp_path / "half.png"], explain=True)
    assert isinstance(result, Tagged)
    assert list(result.heatmaps) == ["red"]
    assert result.heatmaps["red"].tolist() == [[0.125] * 4] * 2 + [[0.0] * 4] * 2


def test_a_name_that_is_no_unicode_is_escaped_in_json_and_comes_back() -> None:
    name = b"caf\xe9 \xc3\xbc.jpg"
    line = json_line(Tagged(Path(os.fsdecode(name)), [("red", 0.5)]))
    assert os.fsencode(json.loads(line.decode("utf-8"))["path"]) == name


def test_photos_are_taken_lazily(tagger: Tagger, tmp_path: Path) -> None:
    path = photo(tmp_path / "a.png")
    taken = 0

    def endless():  # type: ignore[no-untyped-def]
        nonlocal taken
        while True:
            taken += 1
            yield path

    results = tag_photos(tagger, endless(), batch_size=2)
    for _ in range(4):
        next(results)
    results.close()  # type: ignore[attr-defined]
    assert taken < 20


def test_an_error_of_the_tagger_reaches_the_caller_and_leaves_no_threads(
    tagger: Tagger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [photo(tmp_path / f"{index}.png") for index in range(20)]
    calls = itertools.count()

    def predict(pixels: Any) -> Prediction:
        if next(calls) == 2:
            raise RuntimeError("out of memory")
        return Tagger.predict(tagger, pixels)

    monkeypatch.setattr(tagger, "predict", predict)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(tag_photos(tagger, paths, batch_size=2))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("decode", "tag_"))]


def test_few_photos_are_dealt_to_all_cores(colour_tagger: Path, tmp_path: Path) -> None:
    tagger = Tagger.load(colour_tagger, "cpu", threads=4, many=True)
    sizes: list[int] = []

    def predict(pixels: Any) -> Prediction:
        sizes.append(len(pixels))
        return Tagger.predict(tagger, pixels)

    tagger.predict = predict  # type: ignore[method-assign]
    paths = [photo(tmp_path / f"{index}.png") for index in range(4)]
    assert len(list(tag_photos(tagger, paths))) == 4
    assert sizes == [1, 1, 1, 1]


# The journal


def run_with_journal(
    folder: Path, photos: list[Path], tagger: str = "t", stop_after: int | None = None
) -> list[Path]:
    """Tag photos into ``results``, one byte each; return those that were worked on."""
    results = folder / "results"
    journal = Journal(folder / "journal", {"tagger": tagger}, results)
    done = []
    with results.open("r+b" if results.exists() else "wb") as file:
        file.truncate(journal.offset)
        file.seek(0, os.SEEK_END)
        for path in list(journal.select(photos))[:stop_after]:
            file.write(path.name[0].encode())
            file.flush()
            journal.record(path, file.tell())
            done.append(path)
    journal.close()
    return done


@pytest.fixture
def three(tmp_path: Path) -> list[Path]:
    return [photo(tmp_path / name) for name in ("a.png", "b.png", "c.png")]


def test_a_run_goes_on_where_it_stopped(tmp_path: Path, three: list[Path]) -> None:
    assert run_with_journal(tmp_path, three, stop_after=2) == three[:2]
    assert run_with_journal(tmp_path, three) == three[2:]
    assert run_with_journal(tmp_path, three) == []
    assert (tmp_path / "results").read_text() == "abc"


def test_a_run_goes_on_after_a_name_that_is_no_unicode(tmp_path: Path) -> None:
    names = [tmp_path / os.fsdecode(name) for name in (b"caf\xe9.png", b"d.png")]
    photos = [photo(name) for name in names]
    assert run_with_journal(tmp_path, photos, tagger="\udce9", stop_after=1) == photos[:1]
    assert run_with_journal(tmp_path, photos, tagger="\udce9") == photos[1:]


def test_a_changed_photo_is_tagged_again(tmp_path: Path, three: list[Path]) -> None:
    run_with_journal(tmp_path, three)
    photo(three[1], green=200)
    os.utime(three[1], ns=(1, 1))
    assert run_with_journal(tmp_path, three) == [three[1]]


@pytest.mark.parametrize("lost", range(0, 60, 7))
def test_a_journal_cut_off_anywhere_neither_loses_nor_repeats_a_photo(
    tmp_path: Path, three: list[Path], lost: int
) -> None:
    run_with_journal(tmp_path, three)
    journal = tmp_path / "journal"
    journal.write_bytes(journal.read_bytes()[: journal.stat().st_size - lost])
    run_with_journal(tmp_path, three)
    assert (tmp_path / "results").read_text() == "abc"


def test_results_shorter_than_the_journal_says_are_made_anew(tmp_path: Path, three: list[Path]) -> None:
    run_with_journal(tmp_path, three)
    (tmp_path / "results").write_text("a")  # a power cut kept the journal and lost results
    assert run_with_journal(tmp_path, three) == three[1:]
    assert (tmp_path / "results").read_text() == "abc"


def test_another_runs_journal_is_refused(tmp_path: Path, three: list[Path]) -> None:
    run_with_journal(tmp_path, three)
    with pytest.raises(JournalError, match="another tagger or other options"):
        run_with_journal(tmp_path, three, tagger="other")


def test_a_damaged_journal_is_refused(tmp_path: Path, three: list[Path]) -> None:
    run_with_journal(tmp_path, three)
    with (tmp_path / "journal").open("ab") as file:
        file.write(b'{"half": \n')
    with pytest.raises(JournalError, match="damaged"):
        run_with_journal(tmp_path, three)


# Watching


def test_photos_are_found_as_they_appear_and_change(tmp_path: Path) -> None:
    stop = threading.Event()
    first = photo(tmp_path / "a.png")
    lists = watch([str(tmp_path)], 0.01, stop)
    assert next(lists) == [first]
    second = photo(tmp_path / "new" / "b.png")
    assert next(lists) == [second]
    os.utime(first, ns=(1, 1))
    assert next(lists) == [first]
    stop.set()
    assert list(lists) == []


def test_a_link_that_leads_nowhere_is_given_once_and_watching_goes_on(tmp_path: Path) -> None:
    stop = threading.Event()
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    lists = watch([str(tmp_path)], 0.01, stop)
    assert next(lists) == [loop]
    second = photo(tmp_path / "b.png")
    assert next(lists) == [second]
    stop.set()


def test_a_copy_under_way_is_left_until_it_is_whole(tmp_path: Path) -> None:
    stop = threading.Event()
    growing = tmp_path / "a.png"
    growing.touch()

    class Clock(threading.Event):
        """Between two looks the copy grows, three times."""

        looks = 0

        def wait(self, timeout: float | None = None) -> bool:
            self.looks += 1
            if self.looks <= 3:
                with growing.open("ab") as file:
                    file.write(b"more")
            return False

    clock = Clock()
    lists = watch([str(tmp_path)], 0.01, clock)
    assert next(lists) == [growing]
    assert clock.looks == 4
    stop.set()
