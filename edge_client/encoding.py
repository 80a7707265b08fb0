"""Photos through the image encoder, on all cores."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import threading
from collections import deque
from collections.abc import Callable, Collection, Container, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from fedmpt.edge_client.datasets import LabelledPhoto
from fedmpt.edge_client.images import PhotoError, Pixels, decode_pixels, read_photo
from fedmpt.edge_client.onnx_session import open_session, session_device
from fedmpt.protocol.errors import FedmptError

Given = TypeVar("Given")
Made = TypeVar("Made")

logger = logging.getLogger(__name__)


class EncodingError(FedmptError):
    """The image encoder failed on a batch."""


@dataclass(frozen=True, eq=False)
class EncodedPhoto:
    """A photo with its content's SHA-256 and, unless they are known, its tokens float16 ``[M, D]``; or the error."""

    photo: LabelledPhoto
    hash: str = ""
    tokens: npt.NDArray[np.float16] | None = None
    error: PhotoError | None = None


class Encoder:
    """The image encoder of a bundle, to be called from several threads at once; ``size`` is its image size S.

    ``files`` are the bundle's, from which it may read weights.

    On a CPU each call keeps to its caller's core, which leaves none idle while photos are decoded. Other devices take
    one batch at a time.
    """

    def __init__(self, path: Path, device: str, size: int, threads: int, files: Collection[str] = ()) -> None:
        self.size = size
        self._session = open_session(path, device, threads, files=files, apart=True)
        on_cpu = session_device(self._session) == "cpu"
        self._turn = contextlib.nullcontext() if on_cpu else threading.Lock()

    def __call__(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float16]:
        """Tokens ``[B, M, D]`` of uint8 RGB ``[B, S, S, 3]``.

        Raises:
            EncodingError: ONNX Runtime failed, say for want of memory.
        """
        try:
            with self._turn:
                (tokens,) = self._session.run(["tokens"], {"pixels": pixels})
        except Exception as error:  # ONNX Runtime's exceptions share no base class but this
            reason = " ".join(str(error).split())
            raise EncodingError(
                f"the image encoder failed on {len(pixels)} photos ({reason}); "
                "try a smaller --batch-size or --device cpu"
            ) from error
        return np.asarray(tokens).astype(np.float16)


def encode_photos(
    photos: Sequence[LabelledPhoto], encoder: Encoder, known: Container[str], *, workers: int, batch_size: int
) -> Iterator[list[EncodedPhoto]]:
    """Read, decode and encode photos, in order and in batches; contents in ``known`` are read and hashed only.

    Raises:
        EncodingError: the encoder failed. (A photo that cannot be read is an ``EncodedPhoto`` with its error.)
    """
    logger.info("%d workers read and encode %d photos at a time each", workers, batch_size)
    batches = [photos[start : start + batch_size] for start in range(0, len(photos), batch_size)]
    yield from _in_order(lambda batch: _encode(batch, encoder, known), batches, workers)


def _encode(photos: Sequence[LabelledPhoto], encoder: Encoder, known: Container[str]) -> list[EncodedPhoto]:
    items: list[EncodedPhoto] = []
    pixels: dict[str, Pixels] = {}
    for photo in photos:
        try:
            data = read_photo(photo.path)
            content = hashlib.sha256(data).hexdigest()
            if content not in known and content not in pixels:
                pixels[content] = decode_pixels(data, encoder.size, photo.path)
            items.append(EncodedPhoto(photo, content))
        except PhotoError as error:
            items.append(EncodedPhoto(photo, error=error.bare()))
    if not pixels:
        return items
    tokens = dict(zip(pixels, encoder(np.stack(list(pixels.values()))), strict=True))
    return [_with_tokens(item, tokens.get(item.hash)) for item in items]


def _with_tokens(item: EncodedPhoto, tokens: npt.NDArray[np.float16] | None) -> EncodedPhoto:
    if tokens is None or np.isfinite(tokens).all():
        return replace(item, tokens=tokens)
    path = item.photo.path
    return EncodedPhoto(item.photo, error=PhotoError(path, "the encoder gave features that are not finite"))


def _in_order(function: Callable[[Given], Made], tasks: Sequence[Given], workers: int) -> Iterator[Made]:
    """``map`` on several threads, at most twice as many tasks ahead as there are workers."""
    waiting: deque[Future[Made]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for task in tasks:
                waiting.append(pool.submit(function, task))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
