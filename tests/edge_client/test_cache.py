"""The feature cache: one row for each photo content, resumable after a kill, verified when it is opened."""

import dataclasses
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tracemalloc
from collections import namedtuple
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from fedmpt.edge_client import cache as cache_module
from fedmpt.edge_client.cache import CacheError, build_cache, open_cache
from fedmpt.edge_client.datasets import LabelledPhoto
from fedmpt.edge_client.encoding import Encoder, EncodingError
from fedmpt.edge_client.images import load_pixels
from fedmpt.protocol import manifest as bundles

SIZE, PATCH, WIDTH, GRID = 16, 4, 8, 4
TOKENS = 1 + GRID * GRID
LABELS = ("cat", "dog", "sofa")


def save_encoder(path, seed, last):
    """A small image encoder: each patch's mean colour times a random matrix, the class token their mean.

    ``last`` is the operation that ends it.
    """
    matrix = np.random.default_rng(seed).normal(size=(3, WIDTH)).astype(np.float32)
    constants = {
        "matrix": matrix,
        "shape": np.array([0, 3, GRID * GRID], np.int64),
        "axis": np.array([1], np.int64),
    }
    nodes = [
        helper.make_node("Cast", ["pixels"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["float"], ["channels"], perm=[0, 3, 1, 2]),
        helper.make_node(
            "AveragePool", ["channels"], ["means"], kernel_shape=[PATCH] * 2, strides=[PATCH] * 2
        ),
        helper.make_node("Reshape", ["means", "shape"], ["flat"]),
        helper.make_node("Transpose", ["flat"], ["patches"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["patches", "matrix"], ["each"]),
        helper.make_node("ReduceMean", ["each", "axis"], ["class"], keepdims=1),
        helper.make_node("Concat", ["class", "each"], ["all"], axis=1),
        helper.make_node(last, ["all"], ["tokens"]),
    ]
    pixels = helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["B", SIZE, SIZE, 3])
    tokens = helper.make_tensor_value_info("tokens", TensorProto.FLOAT, ["B", TOKENS, WIDTH])
    initializers = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "encoder", [pixels], [tokens], initializers)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)


def make_bundle(folder, *, seed=0, labels=LABELS, last="LpNormalization"):
    """As much of a bundle as a feature cache needs."""
    folder.mkdir()
    save_encoder(folder / "image_encoder.onnx", seed, last)
    spec = bundles.TensorSpec("float32", ("B", TOKENS, WIDTH))
    manifest = bundles.BundleManifest(
        format=bundles.FORMAT,
        version=bundles.VERSION,
        method="zero-shot",
        labels=tuple(labels),
        conditions=(),
        clip=bundles.Clip("test", "none", SIZE, PATCH, WIDTH, WIDTH, 1.0),
        tokens=bundles.Tokens("plain", "full", TOKENS, (GRID, GRID), WIDTH),
        pooling=bundles.Pooling("max", 1.0, 0.1, 1),
        training=bundles.Training("sgd", 0.1, 0.9, 0.0, 0.0, 1.0, 4, 1, 1, True, 1.0, 2.0, 0.05, 0),
        precision="float32",
        state={},
        graphs={"image_encoder": bundles.Graph("image_encoder.onnx", {}, {"tokens": spec})},
        files={
            "image_encoder.onnx": hashlib.sha256((folder / "image_encoder.onnx").read_bytes()).hexdigest()
        },
    )
    bundles.save_manifest(folder, manifest)
    return folder


@pytest.fixture
def bundle(tmp_path):
    return make_bundle(tmp_path / "bundle")


@pytest.fixture
def photos(tmp_path):
    return make_photos(tmp_path / "photos", range(21))


def make_photos(folder, seeds):
    folder.mkdir(exist_ok=True)
    photos = []
    for seed in seeds:
        random = np.random.default_rng(seed)
        path = folder / f"{seed:03}.png"
        Image.fromarray(random.integers(0, 256, (SIZE + seed % 5, SIZE + seed % 3, 3), np.uint8)).save(path)
        photos.append(LabelledPhoto(path, random.integers(-1, 2, len(LABELS)).astype(np.int8)))
    return photos


def token_bytes(folder):
    (path,) = folder.glob("tokens-*.f16")
    return path.read_bytes()


def test_holds_every_photos_features_labels_and_content_hash(bundle, photos, tmp_path):
    report = build_cache(photos, bundle, tmp_path / "cache", batch_size=4)
    cache = open_cache(tmp_path / "cache", bundles.load_manifest(bundle))
    assert (report.photos, report.encoded, report.dropped) == (21, 21, 0)
    assert len(cache) == 21
    assert cache.paths == tuple(str(photo.path) for photo in photos)
    assert cache.hashes == tuple(hashlib.sha256(photo.path.read_bytes()).hexdigest() for photo in photos)
    assert np.array_equal(cache.labels, [photo.labels for photo in photos])
    assert cache.tokens.shape == (21, TOKENS, WIDTH)
    assert cache.tokens.dtype == np.float16
    encoder = Encoder(bundle / "image_encoder.onnx", "cpu", SIZE, threads=2)
    for photo, tokens in zip(photos, cache.tokens, strict=True):
        expected = encoder(load_pixels(photo.path, SIZE)[None])[0]
        np.testing.assert_allclose(tokens, expected, atol=1e-3)


def test_tokens_cannot_be_written_by_accident(bundle, photos, tmp_path):
    build_cache(photos, bundle, tmp_path / "cache")
    cache = open_cache(tmp_path / "cache", bundles.load_manifest(bundle))
    with pytest.raises(ValueError, match="read-only"):
        cache.tokens[0] = 0


def test_two_builds_are_equal_byte_for_byte(bundle, photos, tmp_path):
    for name in ("a", "b"):
        build_cache(photos, bundle, tmp_path / name, batch_size=4)
    assert token_bytes(tmp_path / "a") == token_bytes(tmp_path / "b")


def test_progress_reaches_the_number_of_photos(bundle, photos, tmp_path):
    seen = []
    build_cache(photos, bundle, tmp_path / "cache", progress=lambda done, total: seen.append((done, total)))
    assert seen == [(0, 21), (4, 21), (8, 21), (12, 21), (16, 21), (20, 21), (21, 21)]


def test_second_build_encodes_only_new_contents(bundle, photos, tmp_path):
    build_cache(photos[:15], bundle, tmp_path / "cache")
    before = token_bytes(tmp_path / "cache")
    assert build_cache(photos[:15], bundle, tmp_path / "cache").encoded == 0
    assert build_cache(photos, bundle, tmp_path / "cache").encoded == 6
    assert token_bytes(tmp_path / "cache").startswith(before)


def test_a_renamed_photo_keeps_its_features(bundle, photos, tmp_path):
    build_cache(photos, bundle, tmp_path / "cache")
    renamed = photos[3].path.rename(photos[3].path.with_name("renamed.png"))
    photos[3] = dataclasses.replace(photos[3], path=renamed)
    assert build_cache(photos, bundle, tmp_path / "cache").encoded == 0
    assert open_cache(tmp_path / "cache", bundles.load_manifest(bundle)).paths[3] == str(renamed)


def test_changed_labels_are_read_anew(bundle, photos, tmp_path):
    build_cache(photos, bundle, tmp_path / "cache")
    photos = [dataclasses.replace(photo, labels=np.ones(3, np.int8)) for photo in photos]
    assert build_cache(photos, bundle, tmp_path / "cache").encoded == 0
    assert (open_cache(tmp_path / "cache", bundles.load_manifest(bundle)).labels == 1).all()


def test_features_of_a_photo_that_went_leave_the_disk(bundle, photos, tmp_path):
    build_cache(photos, bundle, tmp_path / "cache")
    manifest = bundles.load_manifest(bundle)
    gone = open_cache(tmp_path / "cache", manifest).tokens[7].tobytes()
    kept = photos[:7] + photos[8:]
    report = build_cache(kept, bundle, tmp_path / "cache")
    assert (report.photos, report.encoded, report.dropped) == (20, 0, 1)
    assert gone not in token_bytes(tmp_path / "cache")
    cache = open_cache(tmp_path / "cache", manifest)
    assert cache.paths == tuple(str(photo.path) for photo in kept)
    build_cache(kept, bundle, tmp_path / "fresh")
    assert np.array_equal(cache.tokens, open_cache(tmp_path / "fresh", manifest).tokens)


def test_a_rebuild_does_not_disturb_a_cache_that_is_open(bundle, photos, tmp_path):
    build_cache(photos, bundle, tmp_path / "cache")
    manifest = bundles.load_manifest(bundle)
    cache = open_cache(tmp_path / "cache", manifest)
    before = cache.tokens.copy()
    build_cache(photos[10:], bundle, tmp_path / "cache")
    assert np.array_equal(cache.tokens, before)
    assert len(open_cache(tmp_path / "cache", manifest)) == 11


def test_bad_photos_are_reported_and_the_others_cached(bundle, photos, tmp_path):
    photos[4].path.write_bytes(b"")
    photos[9].path.write_bytes(photos[9].path.read_bytes()[:-300])
    photos[20].path.unlink()
    report = build_cache(photos, bundle, tmp_path / "cache")
    assert [error.path for error in report.failed] == [photos[i].path for i in (4, 9, 20)]
    assert report.photos == 18


def test_photos_that_failed_do_not_stay_in_memory(bundle, photos, tmp_path):
    bad = []
    for number in range(50):
        path = tmp_path / f"{number}.jpg"
        with path.open("wb") as file:
            file.truncate(4 << 20)
        bad.append(LabelledPhoto(path, photos[0].labels))
    tracemalloc.start()
    report = build_cache([photos[0], *bad], bundle, tmp_path / "cache", threads=1)
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(report.failed) == 50
    assert kept < 4 << 20


def test_no_readable_photo_at_all_is_an_error_and_keeps_the_cache(bundle, photos, tmp_path):
    build_cache(photos, bundle, tmp_path / "cache")
    for photo in photos:
        photo.path.unlink()
    with pytest.raises(CacheError, match=r"none of 21 photos could be read .*no such file"):
        build_cache(photos, bundle, tmp_path / "cache")
    assert len(open_cache(tmp_path / "cache", bundles.load_manifest(bundle))) == 21


def test_copies_of_one_photo_are_one_row_with_merged_labels(bundle, photos, tmp_path):
    copy = tmp_path / "copy.png"
    shutil.copy(photos[0].path, copy)
    first = dataclasses.replace(photos[0], labels=np.array([1, -1, 0], np.int8))
    second = LabelledPhoto(copy, np.array([1, 0, 1], np.int8))
    report = build_cache([first, second], bundle, tmp_path / "cache")
    assert report.duplicates == (copy,)
    cache = open_cache(tmp_path / "cache", bundles.load_manifest(bundle))
    # Agreed; known by one; contradicting and therefore unknown.
    assert cache.labels.tolist() == [[1, 0, -1]]


def test_copies_with_contradicting_labels_are_reported_and_stay_unknown(bundle, photos, tmp_path):
    given = []
    for number, labels in enumerate([(1, 0, 0), (0, 0, -1), (1, 0, 0)]):
        path = tmp_path / f"{number}.png"
        shutil.copy(photos[0].path, path)
        given.append(LabelledPhoto(path, np.array(labels, np.int8)))
    report = build_cache(given, bundle, tmp_path / "cache")
    assert report.contradictions == ((given[0].path, given[1].path), (given[0].path, given[2].path))
    cache = open_cache(tmp_path / "cache", bundles.load_manifest(bundle))
    assert cache.labels.tolist() == [[-1, 0, 0]]


def test_names_that_are_no_unicode_are_kept(bundle, photos, tmp_path):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    path = folder / "a.png"
    shutil.copy(photos[0].path, path)
    build_cache([dataclasses.replace(photos[0], path=path)], bundle, tmp_path / "cache")
    assert open_cache(tmp_path / "cache", bundles.load_manifest(bundle)).paths == (str(path),)


def test_a_photo_with_features_that_are_not_finite_is_reported(photos, tmp_path):
    bundle = make_bundle(tmp_path / "log", last="Reciprocal")  # infinite for a black photo
    Image.new("RGB", (SIZE, SIZE)).save(photos[5].path)
    Image.new("RGB", (SIZE, SIZE), "white").save(photos[6].path)
    white = LabelledPhoto(photos[6].path, photos[6].labels)
    report = build_cache([photos[5], white], bundle, tmp_path / "cache")
    assert [str(error) for error in report.failed] == [
        f"{photos[5].path}: the encoder gave features that are not finite"
    ]
    assert report.photos == 1


def test_an_encoder_that_fails_is_an_error_with_advice(photos, tmp_path):
    bundle = make_bundle(tmp_path / "broken")
    manifest = bundles.load_manifest(bundle)
    larger = dataclasses.replace(manifest, clip=dataclasses.replace(manifest.clip, image_size=2 * SIZE))
    bundles.save_manifest(bundle, larger)
    with pytest.raises(
        EncodingError, match=r"failed on 4 photos .*try a smaller --batch-size or --device cpu"
    ):
        build_cache(photos, bundle, tmp_path / "cache")


# ---------------------------------------------------------------- kills


KILLED_BUILD = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_cache
from fedmpt.edge_client import cache
cache.CHECKPOINT_SECONDS = 0.0
def die_at(count, function):
    calls = iter(range(count))
    def counted(*arguments):
        if next(calls, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments)
    return counted
progress = None
if {where!r} == "photo":
    progress = die_at({count}, lambda done, total: None)
else:
    os.fsync = die_at({count}, os.fsync)
photos = test_cache.make_photos(Path({photos!r}), {seeds!r})
cache.build_cache(photos, Path({bundle!r}), Path({out!r}), batch_size=4, threads=1, progress=progress)
"""


def build_and_kill(photos, bundle, out, where, count):
    script = KILLED_BUILD.format(
        tests=str(Path(__file__).parent),
        where=where,
        count=count,
        photos=str(photos[0].path.parent),
        seeds=[int(photo.path.stem) for photo in photos],
        bundle=str(bundle),
        out=str(out),
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert done.returncode == -9, done.stderr.decode()


@pytest.mark.parametrize(("where", "count"), [("photo", 0), ("photo", 2), ("fsync", 0), ("fsync", 2)])
def test_a_killed_build_is_refused_then_resumed_to_the_same_bytes(bundle, photos, tmp_path, where, count):
    out = tmp_path / "cache"
    build_and_kill(photos, bundle, out, where, count)
    with pytest.raises(CacheError, match="half-written; run the same `fedmpt cache` again"):
        open_cache(out, bundles.load_manifest(bundle))
    report = build_cache(photos, bundle, out, batch_size=4)
    durable = {("photo", 0): 0, ("photo", 2): 8, ("fsync", 0): 0, ("fsync", 2): 8}[where, count]
    assert report.encoded == 21 - durable
    build_cache(photos, bundle, tmp_path / "undisturbed", batch_size=4)
    assert token_bytes(out) == token_bytes(tmp_path / "undisturbed")
    open_cache(out, bundles.load_manifest(bundle))


@pytest.mark.parametrize("count", [0, 1, 2])
def test_a_killed_update_leaves_the_last_complete_cache(bundle, photos, tmp_path, count):
    out, manifest = tmp_path / "cache", bundles.load_manifest(bundle)
    build_cache(photos[:12], bundle, out)
    before = open_cache(out, manifest)
    # Photos go and come; the fsyncs are: the new rows, the new generation's file, its folder.
    build_and_kill(photos[6:14], bundle, out, "fsync", count)
    after = open_cache(out, manifest)
    assert after.hashes == before.hashes
    assert np.array_equal(after.tokens, before.tokens)
    build_cache(photos[6:14], bundle, out)
    assert len(open_cache(out, manifest)) == 8
    assert len(list(out.glob("tokens-*"))) == 1


# ------------------------------------------------------------- refusals


def test_another_encoders_cache_is_refused_by_open_and_build(bundle, photos, tmp_path):
    build_cache(photos, bundle, tmp_path / "cache")
    other = make_bundle(tmp_path / "other", seed=1)
    with pytest.raises(CacheError, match="another image encoder"):
        open_cache(tmp_path / "cache", bundles.load_manifest(other))
    with pytest.raises(CacheError, match="another image encoder"):
        build_cache(photos, other, tmp_path / "cache")


def test_other_labels_are_refused_until_the_cache_is_built_with_them(bundle, photos, tmp_path):
    build_cache(photos, bundle, tmp_path / "cache")
    other = make_bundle(tmp_path / "other", labels=("cat", "dog", "chair"))
    manifest = bundles.load_manifest(other)
    with pytest.raises(CacheError, match=r"other labels .differing in chair, sofa.*the features are kept"):
        open_cache(tmp_path / "cache", manifest)
    assert build_cache(photos, other, tmp_path / "cache").encoded == 0
    open_cache(tmp_path / "cache", manifest)


def test_photos_that_were_read_with_other_labels_are_refused(bundle, photos, tmp_path):
    photos[3] = dataclasses.replace(photos[3], labels=np.zeros(4, np.int8))
    with pytest.raises(CacheError, match="has 3 labels, the photos were read with others"):
        build_cache(photos, bundle, tmp_path / "cache")


def test_an_altered_encoder_is_refused(bundle, photos, tmp_path):
    with (bundle / "image_encoder.onnx").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(bundles.BundleError, match=r"image_encoder\.onnx: missing or altered"):
        build_cache(photos, bundle, tmp_path / "cache")


def test_a_flipped_bit_is_refused_and_mended(bundle, photos, tmp_path):
    out = tmp_path / "cache"
    build_cache(photos, bundle, out)
    sound = open_cache(out, bundles.load_manifest(bundle)).tokens.copy()
    data = bytearray(token_bytes(out))
    data[TOKENS * WIDTH * 2 * 5 + 3] ^= 1
    next(out.glob("tokens-*")).write_bytes(data)
    with pytest.raises(CacheError, match="features of 1 photos are damaged"):
        open_cache(out, bundles.load_manifest(bundle))
    assert build_cache(photos, bundle, out).encoded == 1
    mended = open_cache(out, bundles.load_manifest(bundle)).tokens
    assert np.array_equal(np.sort(mended.sum((1, 2))), np.sort(sound.sum((1, 2))))


def test_a_shortened_token_file_is_refused_and_mended(bundle, photos, tmp_path):
    out = tmp_path / "cache"
    build_cache(photos, bundle, out)
    path = next(out.glob("tokens-*"))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CacheError, match="features of 1 photos are damaged"):
        open_cache(out, bundles.load_manifest(bundle))
    assert build_cache(photos, bundle, out).encoded == 1


@pytest.mark.parametrize("content", [b"", b"path,labels\n", b"SQLite format 3\0" + b"\xff" * 4000])
def test_a_foreign_or_damaged_index_is_refused(bundle, photos, tmp_path, content):
    build_cache(photos, bundle, tmp_path / "cache")
    (tmp_path / "cache" / "index.sqlite").write_bytes(content)
    with pytest.raises(CacheError, match=r"index\.sqlite"):
        open_cache(tmp_path / "cache", bundles.load_manifest(bundle))


def test_a_folder_without_a_cache_is_refused(bundle, tmp_path):
    with pytest.raises(CacheError, match="no feature cache here; make it with `fedmpt cache`"):
        open_cache(tmp_path, bundles.load_manifest(bundle))


def test_a_second_build_at_the_same_time_is_refused(bundle, photos, tmp_path):
    (tmp_path / "cache").mkdir()
    with (tmp_path / "cache" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(CacheError, match="another `fedmpt cache` is writing it"):
            build_cache(photos, bundle, tmp_path / "cache")


def test_too_little_space_is_refused_before_the_work(bundle, photos, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda _: usage(1 << 30, 1 << 30, 1000))
    with pytest.raises(CacheError, match="21 photos need about 0 MB and 0 MB are free"):
        build_cache(photos, bundle, tmp_path / "cache")


def test_a_disk_that_fills_up_is_reported(bundle, photos, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "tokens-0.f16").symlink_to("/dev/full")
    with pytest.raises(CacheError, match="the disk is full; free some space and run `fedmpt cache` again"):
        build_cache(photos, bundle, tmp_path / "cache")


# ------------------------------------------------------------------ split


def test_split_holds_out_about_the_fraction_and_every_photo_is_on_one_side(bundle, tmp_path):
    photos = make_photos(tmp_path / "photos", range(300))
    build_cache(photos, bundle, tmp_path / "cache", batch_size=64)
    train, validation = open_cache(tmp_path / "cache", bundles.load_manifest(bundle)).split(0.2)
    assert sorted([*train, *validation]) == list(range(300))
    assert 40 <= len(validation) <= 80  # 60 expected, standard deviation 7


def test_split_depends_on_content_alone(bundle, photos, tmp_path):
    manifest = bundles.load_manifest(bundle)
    build_cache(photos, bundle, tmp_path / "all")
    build_cache(photos[5:][::-1], bundle, tmp_path / "part")
    whole, part = (open_cache(tmp_path / name, manifest) for name in ("all", "part"))
    held_out = {whole.hashes[i] for i in whole.split(0.5)[1]}
    assert {part.hashes[i] for i in part.split(0.5)[1]} == held_out & set(part.hashes)
