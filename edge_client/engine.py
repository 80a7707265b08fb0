"""What an engine must offer: the bundle's graphs as functions on NumPy arrays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fedmpt.protocol.codec import State
from fedmpt.protocol.errors import FedmptError

FloatArray = NDArray[np.float32]
Progress = Callable[[int, "int | None"], None]

ENGINES = ("onnx", "torch")
BATCH_SIZE = 32


class EngineError(FedmptError):
    """An engine is unknown or cannot be opened here, or it gave a number that is not finite."""


@dataclass(frozen=True)
class HeadOutput:
    """``scores`` [B, C] before κ and δ, ``logits`` [B, C], ``plan`` [B, C, M−1] (sums to 1 over patches)."""

    scores: FloatArray
    logits: FloatArray
    plan: FloatArray


class Engine(Protocol):
    """Loss, gradients and predictions for one bundle; tokens are float16 or float32 ``[B, M, D]``.

    An engine may also have ``stage(tokens, labels)``: a thread that reads ahead gives it the next batch, the
    very arrays of a later :meth:`train_step`, to move to its device meanwhile.
    """

    def train_step(
        self, state: State, tokens: NDArray[np.floating], labels: NDArray[np.int8]
    ) -> tuple[float, State]:
        """Loss of one batch and its gradient for every state tensor; labels ``[B, C]`` 1, 0, −1 unknown."""
        ...

    def text_features(self, state: State) -> FloatArray:
        """The prompts' text features ``[N, C, D]``; they depend on the state alone."""
        ...

    def head(self, state: State, text: FloatArray, tokens: NDArray[np.floating]) -> HeadOutput:
        """Scores, logits and transport plan of a batch under given text features."""
        ...


def open_engine(bundle: Path, name: str = "onnx", device: str = "auto", threads: int | None = None) -> Engine:
    """Open a bundle's graphs with the ``onnx`` or the ``torch`` engine.

    Args:
        bundle: the folder with ``manifest.json``.
        name: ``onnx`` (needs onnxruntime) or ``torch`` (needs the ``workstation`` extra).
        device: ``auto``, ``cpu``, ``cuda`` or ``tensorrt``.
        threads: cores to use; all of them where None.

    Raises:
        EngineError: unknown engine, or its library is not installed.
    """
    if name == "onnx":
        from fedmpt.edge_client.onnx_engine import OnnxEngine

        return OnnxEngine.open(bundle, device, threads)
    if name == "torch":
        try:
            from fedmpt.edge_client.torch_engine import TorchEngine
        except ModuleNotFoundError as error:
            raise EngineError(
                f"engine torch: {error.name} is not installed; "
                "pip install 'fedmpt-edge[workstation]', or use --engine onnx"
            ) from error
        return TorchEngine.open(bundle, device, threads)
    raise EngineError(f"engine {name!r} is unknown; use one of {', '.join(ENGINES)}")


def predict(
    engine: Engine,
    state: State,
    tokens: NDArray[np.floating[Any]],
    rows: NDArray[np.int64] | None = None,
    *,
    batch_size: int = BATCH_SIZE,
    progress: Progress | None = None,
    out_of_time: Callable[[], bool] | None = None,
) -> tuple[FloatArray, FloatArray]:
    """Scores (before κ and δ) and logits, ``[n, C]`` each, of photos by their tokens ``[n, M, D]``.

    Args:
        engine, state, tokens: what to compute them with; the text features are computed once.
        rows: the photos that are wanted; all of them where None.
        batch_size: photos at a time.
        progress: called with (photos done, total) after each batch.
        out_of_time: asked after each batch; True ends with the first photos, those that are done.

    Raises:
        EngineError: one is not finite.
    """
    text = engine.text_features(state)
    total = len(tokens) if rows is None else len(rows)
    scores = np.empty((total, text.shape[1]), np.float32)
    logits = np.empty_like(scores)
    for start in range(0, total, batch_size):
        part = slice(start, min(start + batch_size, total))
        output = engine.head(state, text, tokens[part if rows is None else rows[part]])
        scores[part], logits[part] = output.scores, output.logits
        if progress:
            progress(part.stop, total)
        if out_of_time and out_of_time():
            scores, logits = scores[: part.stop], logits[: part.stop]
            break
    if not np.isfinite(logits).all():
        raise EngineError("the head gave a logit that is not finite; check the state and the feature cache")
    return scores, logits
