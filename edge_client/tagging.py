"""Many photos through a tagger: found, decoded on all cores, batched, resumable, watched."""

from __future__ import annotations

import fnmatch
import functools
import glob
import itertools
import os
import threading
from collections import Counter, deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedmpt.edge_client.images import PhotoError, Pixels, load_pixels
from fedmpt.edge_client.tag_journal import Signature, signature
from fedmpt.edge_client.tagger import Prediction, Tagger, Tags

Choose = Callable[[NDArray[np.float32]], Tags]
Decoding = tuple[Path, "Future[Pixels | PhotoError]"]

SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jp2", ".j2k"}
    | {".ppm", ".pgm", ".pbm"}
)
# In folders these are not passed over in silence: their owner takes them for photos, and is told to convert them.
UNREAD_SUFFIXES = frozenset({".heic", ".heif", ".hif"})
# What NAS systems, operating systems and photo programs keep among the photos: thumbnails, waste baskets, snapshots.
SERVICE_FOLDERS = frozenset((
    "@eadir", "@recycle", "@recently-snapshot", "@tmp", "@sharesnap", "@transcode", "#recycle", "#snapshot",
    "~snapshot", "$recycle.bin", "system volume information", "lost+found", "network trash folder",
    "temporary items", "lost.dir",
))  # fmt: skip
# Folders that a photo program takes for one file: what it does not know inside would damage it.
LIBRARY_SUFFIXES = frozenset((
    ".photoslibrary", ".photolibrary", ".migratedphotolibrary", ".aplibrary", ".migratedaplibrary", ".lrdata",
    ".lrcat-data", ".lrlibrary", ".cocatalog", ".cosessiondb", ".dtbase2", ".imovielibrary", ".tvlibrary",
))  # fmt: skip
BATCH_SIZE = 8
# Where each core computes a batch of its own: it is as fast, and the last cores idle less.
STREAM_BATCH_SIZE = 2
LOOKAHEAD = 3  # batches that are decoded while others are computed


@dataclass(frozen=True, eq=False)
class Tagged:
    """One photo's labels, most probable first; ``heatmaps`` (by label, ``[rows, columns]``) if asked for."""

    path: Path
    tags: Tags
    heatmaps: dict[str, NDArray[np.float32]] = field(default_factory=dict)


def find_photos(
    sources: Iterable[str], skipped: Counter[str] | None = None, exclude: Collection[str] = ()
) -> Iterator[Path]:
    """Photo files of files, folders (recursive) and glob patterns, in name order within a folder.

    A named file or folder is taken whatever it is called, also if it does not exist (its decoding will say so). In
    folders files without a photo's suffix are passed over and counted in ``skipped`` by suffix. Hidden files and
    folders are left out. So are service folders (see :func:`is_service_folder`) and what a pattern of ``exclude``
    matches (a name; ``*`` and ``?`` as in a shell), which are counted in ``skipped`` by name. A folder that is reached
    twice by symbolic links is entered once. What cannot be looked into is yielded like a photo, so that its decoding
    says why.
    """
    seen: set[tuple[int, int]] = set()
    for source in sources:
        is_pattern = not os.path.lexists(source) and glob.has_magic(source)
        fixed = len(list(itertools.takewhile(lambda part: not glob.has_magic(part), Path(source).parts)))
        for path in _expand(source, exclude) if is_pattern else [Path(source)]:
            left_out = [part for part in path.parts[fixed:] if is_pattern and _is_left_out(part, exclude)]
            if left_out:
                if skipped is not None:
                    skipped[left_out[0]] += 1
            elif _is_folder(path):
                yield from _photos_below(path, seen, skipped, exclude)
            else:
                yield path


def is_service_folder(name: str) -> bool:
    """Whether a folder of this name holds no photos for people: a NAS system's, a waste basket, a library's inside."""
    folded = name.lower()
    return folded in SERVICE_FOLDERS or os.path.splitext(folded)[1] in LIBRARY_SUFFIXES  # noqa: PTH122  # a bare name


def tag_photos(
    tagger: Tagger,
    photos: Iterable[Path],
    *,
    top: int | None = None,
    min_probability: float | None = None,
    explain: bool = False,
    batch_size: int | None = None,
    workers: int | None = None,
) -> Generator[Tagged | PhotoError, None, None]:
    """Tag photos in their order; a photo that cannot be read gives its PhotoError instead of ending the run.

    Args:
        tagger: the loaded tagger.
        photos: files; read lazily.
        top: at most so many labels a photo.
        min_probability: one threshold for all labels, the tagger's own where None.
        explain: whether results carry the heat maps of the labels found.
        batch_size: photos computed together; it matters to speed alone (and the last bits). Where None, what suits
            the tagger's streams.
        workers: threads that decode; one per core where None.
    """
    workers = workers or len(os.sched_getaffinity(0))
    streams = tagger.streams
    batch_size = batch_size or (BATCH_SIZE if streams == 1 else STREAM_BATCH_SIZE)
    size = tagger.info.image_size
    choose = functools.partial(tagger.choose, top=top, min_probability=min_probability)
    pending: deque[Decoding] = deque()
    computing: deque[Future[list[Tagged | PhotoError]]] = deque()
    photos = iter(photos)
    with (
        ThreadPoolExecutor(workers, thread_name_prefix="decode") as decoders,
        ThreadPoolExecutor(streams, thread_name_prefix="tag") as computers,
    ):
        try:
            while True:
                for path in itertools.islice(photos, (streams + LOOKAHEAD) * batch_size - len(pending)):
                    pending.append((path, decoders.submit(_decode, path, size)))
                # One batch more than there are streams, so that none idles while results are used.
                while pending and len(computing) <= streams:
                    fair = -(-len(pending) // streams)  # the last photos go to as many cores as there are
                    batch = [pending.popleft() for _ in range(min(batch_size, fair))]
                    computing.append(computers.submit(_tag_batch, tagger, batch, choose, explain))
                if not computing:
                    return
                yield from computing.popleft().result()
        finally:
            computers.shutdown(wait=False, cancel_futures=True)  # first, as it waits for decoders
            decoders.shutdown(cancel_futures=True)


def watch(
    sources: Sequence[str], interval: float, stop: threading.Event, exclude: Collection[str] = ()
) -> Iterator[list[Path]]:
    """Lists of photos as they appear or change, until ``stop`` is set; at first those that are there.

    The folders are looked through every ``interval`` seconds (which, unlike the kernel's notices, also works on
    network shares); a photo is yielded once two looks in a row found it of the same size and time, so that a copy
    under way is not read half.
    """
    last: dict[Path, Signature | None] = {}
    given: dict[Path, Signature | None] = {}
    while not stop.is_set():
        now = {path: signature(path) for path in find_photos(sources, exclude=exclude)}
        ready = [path for path, found in now.items() if last.get(path, ()) == found != given.get(path, ())]
        last, given = now, {path: found for path, found in given.items() if path in now}
        given.update((path, now[path]) for path in ready)
        if ready:
            yield ready
        stop.wait(interval)


def _tag_batch(
    tagger: Tagger, batch: Sequence[Decoding], choose: Choose, explain: bool
) -> list[Tagged | PhotoError]:
    decoded = [(path, future.result()) for path, future in batch]
    good = [pixels for _, pixels in decoded if not isinstance(pixels, PhotoError)]
    prediction = tagger.predict(np.stack(good)) if good else Prediction(np.empty((0, 0), np.float32), None)
    rows = itertools.count()
    results: list[Tagged | PhotoError] = []
    for path, pixels in decoded:
        if isinstance(pixels, PhotoError):
            results.append(pixels)
            continue
        row = next(rows)
        tags = choose(prediction.probabilities[row])
        maps = {}
        if explain and prediction.heatmaps is not None:
            maps = {label: prediction.heatmaps[row, tagger.info.labels.index(label)] for label, _ in tags}
        results.append(Tagged(path, tags, maps))
    return results


def _decode(path: Path, size: int) -> Pixels | PhotoError:
    try:
        return load_pixels(path, size)
    except PhotoError as error:
        return error.bare()


def _photos_below(
    folder: Path, seen: set[tuple[int, int]], skipped: Counter[str] | None, exclude: Collection[str]
) -> Iterator[Path]:
    for path, kind in _walk(folder, seen, exclude, skipped):
        suffix = path.suffix.lower()
        if kind == "unreadable" or (kind == "file" and suffix in SUFFIXES | UNREAD_SUFFIXES):
            yield path
        elif kind == "file" and skipped is not None:
            skipped[suffix] += 1


def _expand(pattern: str, exclude: Collection[str]) -> list[Path]:
    """What a glob pattern names, in name order; ``**`` is walked here, as glob's own runs round in loops of links."""
    parts = Path(pattern).parts
    if "**" not in parts:
        return sorted(map(Path, glob.glob(pattern)))  # noqa: PTH207  # takes absolute patterns too
    first = parts.index("**")
    below = parts[first + 1 :]
    found: set[Path] = set()
    for base in filter(_is_folder, _expand(str(Path(*parts[:first])), exclude)):
        if not below:
            found.add(base)
            continue
        for path, kind in _walk(base, set(), exclude):
            if kind == "folder":
                found.update(_expand(str(Path(glob.escape(str(path)), *below)), exclude))
            elif kind == "unreadable":
                found.add(path)
    return sorted(found)


def _walk(
    folder: Path, seen: set[tuple[int, int]], exclude: Collection[str], skipped: Counter[str] | None = None
) -> Iterator[tuple[Path, str]]:
    """A folder and all below that is not left out, in name order, each a folder, a file or unreadable."""
    waiting: list[tuple[Path, os.DirEntry[str] | None]] = [(folder, None)]
    while waiting:
        path, entry = waiting.pop()
        try:
            if entry and not entry.is_dir():  # fails in a loop of links, and on links into closed folders
                yield path, "file"
                continue
            status = path.stat()
            entries = sorted(os.scandir(path), key=lambda entry: entry.name, reverse=True)
        except OSError:
            yield path, "unreadable"
            continue
        if (status.st_dev, status.st_ino) not in seen:
            seen.add((status.st_dev, status.st_ino))
            yield path, "folder"
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if _is_left_out(entry.name, exclude):
                    if skipped is not None:
                        skipped[entry.name] += 1
                    continue
                waiting.append((path / entry.name, entry))


def _is_left_out(name: str, exclude: Collection[str]) -> bool:
    return is_service_folder(name) or any(fnmatch.fnmatchcase(name, pattern) for pattern in exclude)


def _is_folder(path: Path) -> bool:
    return os.path.isdir(path)  # noqa: PTH112  # Path.is_dir raises where it may not look
