"""What an engine must offer: the bundle's graphs as functions on NumPy arrays."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fedmpt.protocol.codec import State
from fedmpt.protocol.errors import FedmptError

FloatArray = NDArray[np.float32]

ENGINES = ("onnx", "torch")


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
