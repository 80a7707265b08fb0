"""The feature cache: every photo through the frozen image encoder, once."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fedmpt.edge_client import cache_store
from fedmpt.edge_client.cache_store import CacheError, Entry, Meta, Store
from fedmpt.edge_client.datasets import LabelledPhoto
from fedmpt.edge_client.encoding import EncodedPhoto, Encoder, encode_photos
from fedmpt.edge_client.images import PhotoError
from fedmpt.edge_client.labels import UNKNOWN, Labels
from fedmpt.protocol.files import sha256_file
from fedmpt.protocol.manifest import BundleError, BundleManifest, load_manifest

CHECKPOINT_SECONDS = 2.0  # what a kill may cost; each checkpoint waits for the disk a few times
SPARE_BYTES = 64 << 20

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class FeatureCache:
    """A complete cache: row i of everything belongs to one photo content.

    ``tokens`` float16 ``[n, M, D]``, memory-mapped and read-only; ``labels`` int8 ``[n, C]`` (1, 0, −1 unknown);
    ``hashes`` the SHA-256 of each photo's content; ``paths`` where it was found.
    """

    tokens: npt.NDArray[np.float16]
    labels: Labels
    hashes: tuple[str, ...]
    paths: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.hashes)

    def split(self, fraction: float = 0.1) -> tuple[Indices, Indices]:
        """Row indices for training and for validation.

        About ``fraction`` of the photos validate: those whose content hash, read as a number in [0, 1), lies
        below it. So a photo's side never changes, whatever is added, renamed or copied.
        """
        position = np.array([int(content[:13], 16) for content in self.hashes], np.float64) / 16.0**13
        held_out = position < fraction
        return np.flatnonzero(~held_out), np.flatnonzero(held_out)


@dataclass(frozen=True)
class CacheReport:
    """What a build did: photos in the cache, new ones encoded, old ones dropped, copies, and those that failed.

    ``duplicates`` are photos whose content another one has too; ``contradictions`` those of them whose labels
    disagree with that one's, each as (the other, it): the labels in question are unknown.
    """

    photos: int
    encoded: int
    dropped: int
    duplicates: tuple[Path, ...]
    contradictions: tuple[tuple[Path, Path], ...]
    failed: tuple[PhotoError, ...]


def open_cache(path: Path, manifest: BundleManifest) -> FeatureCache:
    """Open a feature cache for a bundle, after checking all of it, the checksums of the tokens included.

    Raises:
        CacheError: missing, half-written, damaged, or of another encoder or other labels than the bundle's.
    """
    meta, rows = cache_store.read_index(path)
    if (meta.encoder, meta.tokens, meta.width) != (
        manifest.encoder_digest,
        manifest.tokens.count,
        manifest.tokens.width,
    ):
        raise CacheError(cache_store.other_encoder(path))
    if meta.photos is None:
        raise CacheError(
            f"{path}: half-written; run the same `fedmpt cache` again, it goes on where it stopped"
        )
    if meta.labels != manifest.labels:
        only = sorted(set(meta.labels) ^ set(manifest.labels))
        what = f"differing in {', '.join(only[:5])}" if only else "in another order"
        raise CacheError(
            f"{path}: made for other labels ({what}); run `fedmpt cache` with this bundle to read them anew, "
            "the features are kept"
        )
    view = [row for row in rows if row.labels is not None]
    sound = [row.slot for row in view] == list(range(meta.photos))
    if not sound or any(len(row.labels or b"") != len(meta.labels) for row in view):
        raise CacheError(
            f"{path}: the index does not fit the cache; run `fedmpt cache` again, in a new folder if that does not help"
        )
    damaged = cache_store.damaged_slots(path, meta, view)
    if damaged:
        raise CacheError(
            f"{path}: the features of {len(damaged)} photos are damaged; run `fedmpt cache` again to mend them"
        )
    labels = np.frombuffer(b"".join(row.labels or b"" for row in view), np.int8)
    return FeatureCache(
        tokens=cache_store.map_tokens(path, meta, len(view)),
        labels=labels.reshape(len(view), len(meta.labels)),
        hashes=tuple(row.hash for row in view),
        paths=tuple(row.path or "" for row in view),
    )


def build_cache(
    photos: Sequence[LabelledPhoto],
    bundle: Path,
    out: Path,
    *,
    device: str = "auto",
    threads: int | None = None,
    batch_size: int = 4,
    progress: Callable[[int, int | None], None] | None = None,
) -> CacheReport:
    """Encode photos into the cache at ``out``; afterwards it holds exactly these photos.

    Only contents that it does not have yet are encoded, and a build that was killed goes on where it stopped.
    Photos that cannot be read are left out and listed in the report.

    Raises:
        BundleError: the bundle's image encoder is missing or altered.
        CacheError: ``out`` holds another encoder's cache, another build runs, the disk is full, or not one photo
            could be read.
        EncodingError: the encoder failed.
        SessionError: ONNX Runtime or the device cannot be had.
    """
    manifest = load_manifest(bundle)
    if any(photo.labels.shape != (len(manifest.labels),) for photo in photos):
        raise CacheError(f"{bundle}: has {len(manifest.labels)} labels, the photos were read with others")
    encoder_file = bundle / manifest.graphs["image_encoder"].file
    if not encoder_file.is_file() or sha256_file(encoder_file) != manifest.encoder_digest:
        raise BundleError(f"{encoder_file}: missing or altered; copy the whole bundle folder again")
    meta = Meta(
        encoder=manifest.encoder_digest,
        labels=manifest.labels,
        tokens=manifest.tokens.count,
        width=manifest.tokens.width,
        generation=0,
        photos=None,
    )
    workers = threads or len(os.sched_getaffinity(0))
    with cache_store.open_store(out, meta) as store:
        encoder = Encoder(encoder_file, device, manifest.clip.image_size, workers, manifest.files)
        _check_space(out, store, len(photos))
        build = _Build(store)
        if progress:
            progress(0, len(photos))
        done = 0
        for items in encode_photos(photos, encoder, store, workers=workers, batch_size=batch_size):
            build.add(items)
            done += len(items)
            if progress:
                progress(done, len(photos))
        if not build.view:
            if not photos:
                raise CacheError(f"{out}: no photos were given")
            reasons = "; ".join(str(error) for error in build.failed[:3])
            raise CacheError(f"{out}: none of {len(photos)} photos could be read ({reasons})")
        dropped = store.publish(build.view, manifest.labels)
    return CacheReport(
        photos=len(build.view),
        encoded=build.encoded,
        dropped=dropped,
        duplicates=tuple(build.duplicates),
        contradictions=tuple(build.contradictions),
        failed=tuple(build.failed),
    )


class _Build:
    """What a build has found so far."""

    def __init__(self, store: Store) -> None:
        self.view: dict[str, Entry] = {}
        self.failed: list[PhotoError] = []
        self.duplicates: list[Path] = []
        self.contradictions: list[tuple[Path, Path]] = []
        self.encoded = 0
        self._disputed: dict[str, npt.NDArray[np.bool_]] = {}
        self._store = store
        self._saved = time.monotonic()

    def add(self, items: Sequence[EncodedPhoto]) -> None:
        """Enter photos into the view and their tokens, where they are new, into the store."""
        for item in items:
            entry = self.view.get(item.hash)
            if item.error:
                self.failed.append(item.error)
            elif entry:
                self.duplicates.append(item.photo.path)
                self.view[item.hash] = self._merge(entry, item)
            else:
                self.view[item.hash] = Entry(str(item.photo.path), item.photo.labels)
                if item.tokens is not None:
                    self._store.append(item.hash, item.tokens)
                    self.encoded += 1
        if time.monotonic() - self._saved > CHECKPOINT_SECONDS:
            self._store.checkpoint()
            self._saved = time.monotonic()

    def _merge(self, entry: Entry, copy: EncodedPhoto) -> Entry:
        """Labels of one content that was labelled twice: known beats unknown, a contradiction is unknown for good."""
        first, second = entry.labels, copy.photo.labels
        disputed = self._disputed.setdefault(copy.hash, np.zeros(len(first), np.bool_))
        disputed |= (first != second) & (first != UNKNOWN) & (second != UNKNOWN)
        if (disputed & (second != UNKNOWN)).any():
            self.contradictions.append((Path(entry.path), copy.photo.path))
        labels = np.where(first == UNKNOWN, second, first)
        labels[disputed] = UNKNOWN
        return Entry(entry.path, labels)


def _check_space(out: Path, store: Store, photos: int) -> None:
    """Refuse before the work, not after hours of it; photos that the cache has already need no room."""
    needed = max(0, photos - len(store)) * store.row_bytes
    free = shutil.disk_usage(out).free - SPARE_BYTES
    if needed > free:
        raise CacheError(
            f"{out}: {photos} photos need about {needed >> 20} MB and {max(free, 0) >> 20} MB are free; "
            "free some space, or use a bundle with pooled tokens"
        )
