"""What runs share, made once and kept in a store folder: bundles and feature sets.

Every folder is named by a digest of what it is made from and appears only when it is whole, so that interrupted
work goes on, and several processes (or machines with a common file system) can share one store.
"""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmpt.edge_client.cache import FeatureCache, build_cache, open_cache
from fedmpt.edge_client.datasets import LabelledPhoto
from fedmpt.edge_client.metrics import Pair
from fedmpt.edge_client.onnx_session import open_session
from fedmpt.export.presets import DEFAULT
from fedmpt.protocol.codec import State
from fedmpt.protocol.files import sha256_file
from fedmpt.protocol.manifest import BundleManifest, Pooling, Training, canonical_json, load_manifest
from fedmpt.simulation.experiments import Settings
from fedmpt.simulation.photo_sets import PhotoSet, read_photo_set
from fedmpt.simulation.scenes import SceneSpecification, draw_scenes
from fedmpt.simulation.scenes_sets import FEDERATION_LABELS, federation_plan

MICRO_CLIP = Path(__file__).parent / "data" / "micro-clip"
POOLED_CLIENTS = 6  # where photos are dealt anew, so many clients' scenes are pooled first
ENCODED_AT_ONCE = 32
VALIDATION_FRACTION = 0.1  # of real photos, by content hash


@dataclass(frozen=True)
class Photos:
    """A run's data. ``owner [n]`` indexes the client that each training photo was drawn for.

    Thresholds are chosen on ``validation`` alone. ``pairs``: whose spurious activation is measured; None where
    they are to be found in the clients' labels.
    """

    train: FeatureCache
    owner: NDArray[np.int64]
    validation: FeatureCache
    tests: dict[str, FeatureCache]
    pairs: tuple[Pair, ...] | None


def training_of(settings: Settings) -> Training:
    """The training set-up of a run: the default preset, with what the settings change."""
    changes: dict[str, Any] = {
        "rounds": settings.rounds,
        "epochs": settings.epochs,
        "batch_size": settings.batch_size,
        "calibrate": settings.calibrate,
        "seed": settings.seed,
    }
    if settings.optimizer:
        changes["optimizer"] = settings.optimizer
    if settings.learning_rate:
        changes["learning_rate"] = settings.learning_rate
    return dataclasses.replace(DEFAULT.training, **changes)


def pooling_of(settings: Settings) -> Pooling:
    """How regions are pooled: the default preset, with what the settings change."""
    preset = DEFAULT.pooling
    return Pooling(
        settings.pooling or preset.name,
        settings.tau or preset.tau,
        settings.reg or preset.reg,
        settings.iterations or preset.iterations,
    )


def bundle_folder(settings: Settings, store: Path) -> Path:
    """Where a run's bundle is kept; its graphs depend on no seed, rate or number of rounds."""
    named = ("method", "tokens", "token_mode", "context", "rank", "batch_size")
    graph = {name: getattr(settings, name) for name in named} | dataclasses.asdict(pooling_of(settings))
    clip = _clip_folder(settings)
    weights = sorted(clip.glob("*.safetensors")) if clip.is_dir() else []
    source = [sha256_file(path) for path in weights] or settings.clip
    return store / "bundles" / _digest([graph, source, settings.data])


def open_bundle(settings: Settings, store: Path) -> tuple[Path, BundleManifest]:
    """The run's bundle, built if the store does not have it."""
    folder = bundle_folder(settings, store)
    if not (folder / "manifest.json").is_file():
        _appear(folder, lambda scratch: _build_bundle(settings, scratch))
    return folder, load_manifest(folder)


def initial_state(bundle: Path, seed: int) -> State:
    """The state before any round, drawn with a run's own seed."""
    from fedmpt.export.frozen import load_frozen
    from fedmpt.export.methods import initial_state as draw

    return {name: value.numpy() for name, value in draw(load_frozen(bundle)[0], seed).items()}


def open_photos(settings: Settings, store: Path, bundle: Path) -> Photos:
    """The run's photos as features of the bundle's encoder, made if the store does not have them."""
    if settings.data == "scenes":
        return _scenes(settings, store, bundle)
    manifest = load_manifest(bundle)
    photos = read_photo_set(settings.data, Path(settings.root))
    caches = {}
    for name, listed, limit in (
        ("train", photos.train, settings.photos),
        ("test", photos.test, settings.test_photos),
    ):
        chosen = _some(listed, limit, settings.seed)
        key = [name, str(Path(settings.root).resolve()), len(chosen), settings.seed if limit else 0]
        folder = store / "features" / _digest([key, settings.data, manifest.encoder_digest])
        build_cache(chosen, bundle, folder)
        caches[name] = open_cache(folder, manifest)
    rows, held_out = caches["train"].split(VALIDATION_FRACTION)
    return Photos(
        _rows(caches["train"], rows),
        np.zeros(len(rows), np.int64),
        _rows(caches["train"], held_out),
        {"test": caches["test"]},
        None,
    )


def _scenes(settings: Settings, store: Path, bundle: Path) -> Photos:
    clients = settings.clients if settings.partition == "own" else POOLED_CLIENTS
    plan = federation_plan(settings.seed, clients, settings.strength)
    specifications = list(plan.clients.values())
    each = settings.photos // clients
    half = settings.test_photos // 2

    def features(parts: Sequence[tuple[SceneSpecification, int]], stream: int) -> FeatureCache:
        return _scene_features(parts, 1000 * settings.seed + stream, store, bundle)

    index = {label: position for position, label in enumerate(FEDERATION_LABELS)}
    pairs = sorted({(index[i], index[j]) for site in plan.pairs.values() for i, j in site})
    return Photos(
        features([(specification, each) for specification in specifications], 1),
        np.repeat(np.arange(clients), each),
        features([(plan.decorrelated, half)], 2),
        {
            "correlated": features([(item, half // clients) for item in specifications], 3),
            "decorrelated": features([(plan.decorrelated, settings.test_photos)], 4),
        },
        tuple(pairs),
    )


def _scene_features(
    parts: Sequence[tuple[SceneSpecification, int]], seed: int, store: Path, bundle: Path
) -> FeatureCache:
    manifest = load_manifest(bundle)
    size = manifest.clip.image_size
    parts = [(dataclasses.replace(specification, size=size), count) for specification, count in parts]
    described = [[dataclasses.asdict(specification), count] for specification, count in parts]
    folder = store / "features" / _digest([described, seed, manifest.encoder_digest])
    if not folder.is_dir():
        _appear(folder, lambda scratch: _encode_scenes(parts, seed, bundle, manifest, scratch))
    return FeatureCache(
        np.load(folder / "tokens.npy", mmap_mode="r"),
        np.load(folder / "labels.npy"),
        tuple((folder / "hashes.txt").read_text().split()),
        (),
    )


def _encode_scenes(
    parts: Sequence[tuple[SceneSpecification, int]],
    seed: int,
    bundle: Path,
    manifest: BundleManifest,
    out: Path,
) -> None:
    encoder = bundle / manifest.graphs["image_encoder"].file
    session = open_session(encoder, "cpu", 1, files=manifest.files)
    total = sum(count for _, count in parts)
    shape = (total, manifest.tokens.count, manifest.tokens.width)
    tokens = np.lib.format.open_memmap(out / "tokens.npy", "w+", np.float16, shape)
    labels, hashes, row = [], [], 0
    for number, (specification, count) in enumerate(parts):
        for start in range(0, count, ENCODED_AT_ONCE):
            size = min(ENCODED_AT_ONCE, count - start)
            drawn = draw_scenes(specification, size, 1_000_000 * seed + number, start=start)
            tokens[row : row + size] = session.run(["tokens"], {"pixels": drawn.pixels})[0]
            labels.append(drawn.labels)
            hashes += [hashlib.sha256(pixels.tobytes()).hexdigest() for pixels in drawn.pixels]
            row += size
    tokens.flush()
    np.save(out / "labels.npy", np.concatenate(labels))
    (out / "hashes.txt").write_text("\n".join(hashes))


def _build_bundle(settings: Settings, out: Path) -> None:
    from fedmpt.export.bundle import build_bundle
    from fedmpt.export.clip import load_clip

    options: dict[str, Any] = {}
    if settings.tokens:
        options["token_kind"] = settings.tokens
    if settings.token_mode:
        options["token_mode"] = settings.token_mode
    if settings.context:
        options |= {"condition_context": settings.context, "class_context": settings.context}
    if settings.rank:
        options["adapter_rank"] = settings.rank
    clip = _clip_folder(settings)
    photo_set: PhotoSet | None = None
    if settings.data != "scenes":
        photo_set = read_photo_set(settings.data, Path(settings.root))
    build_bundle(
        load_clip(str(clip) if clip.is_dir() else settings.clip),
        photo_set.labels if photo_set else FEDERATION_LABELS,
        out,
        method=settings.method,
        pooling=pooling_of(settings),
        training=training_of(dataclasses.replace(settings, seed=0)),
        **options,
    )


def _clip_folder(settings: Settings) -> Path:
    return MICRO_CLIP if settings.clip == "micro-clip" else Path(settings.clip)


def _appear(folder: Path, make: Callable[[Path], None]) -> None:
    """Let ``make`` fill a scratch folder, then give it its name; whoever comes second is dropped."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".part-") as scratch:
        made = Path(scratch) / "made"
        made.mkdir()
        make(made)
        try:
            made.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
            shutil.rmtree(made)


def _some(photos: list[LabelledPhoto], limit: int, seed: int) -> list[LabelledPhoto]:
    if not limit or limit >= len(photos):
        return photos
    chosen = np.random.default_rng(seed).choice(len(photos), limit, replace=False)
    return [photos[index] for index in sorted(chosen)]


def _rows(cache: FeatureCache, rows: NDArray[np.int64]) -> FeatureCache:
    hashes, paths = (tuple(values[row] for row in rows) for values in (cache.hashes, cache.paths))
    return FeatureCache(cache.tokens[rows], cache.labels[rows], hashes, paths)


def _digest(value: Any) -> str:
    return hashlib.sha256(canonical_json(value)).hexdigest()[:20]
