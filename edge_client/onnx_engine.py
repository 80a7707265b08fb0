"""The default engine: the bundle's graphs in ONNX Runtime, without PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmpt.edge_client.engine import EngineError, FloatArray, HeadOutput
from fedmpt.edge_client.onnx_session import open_session
from fedmpt.protocol.codec import State
from fedmpt.protocol.manifest import BundleManifest, load_manifest


class OnnxEngine:
    """Sessions are opened when first needed, so that an evaluation never loads the train step."""

    def __init__(self, bundle: Path, manifest: BundleManifest, device: str, threads: int | None) -> None:
        self._bundle = bundle
        self._manifest = manifest
        self._device = device
        self._threads = threads
        self._sessions: dict[str, Any] = {}  # by graph name
        self._tokens = np.empty((0, manifest.tokens.count, manifest.tokens.width), np.float32)

    @classmethod
    def open(cls, bundle: Path, device: str = "auto", threads: int | None = None) -> OnnxEngine:
        """Open a bundle folder.

        Raises:
            BundleError: it is none.
            SessionError: ONNX Runtime or the device cannot be had (found out with the head, the smallest graph).
        """
        engine = cls(bundle, load_manifest(bundle), device, threads)
        engine._session("head")
        return engine

    def train_step(
        self, state: State, tokens: NDArray[np.floating[Any]], labels: NDArray[np.int8]
    ) -> tuple[float, State]:
        """See :class:`fedmpt.edge_client.engine.Engine`."""
        graph = self._manifest.graphs["train_step"]
        batch = graph.inputs["labels"].shape[0]
        rows = batch if isinstance(batch, int) else len(labels)
        if len(labels) > rows:
            raise EngineError(f"a batch of {len(labels)} photos, but the bundle's train step takes {rows}")
        # Photos without a known label change neither loss nor gradients: they fill a fixed batch.
        padded = np.full((rows, labels.shape[1]), -1, np.int8)
        padded[: len(labels)] = labels
        outputs = self._run("train_step", {**state, "tokens": self._cast(tokens, rows), "labels": padded})
        return float(outputs["loss"]), {name: outputs[f"gradient.{name}"] for name in state}

    def text_features(self, state: State) -> FloatArray:
        """See :class:`fedmpt.edge_client.engine.Engine`."""
        return self._run("text_features", state)["text"]

    def head(self, state: State, text: FloatArray, tokens: NDArray[np.floating[Any]]) -> HeadOutput:
        """See :class:`fedmpt.edge_client.engine.Engine`."""
        values = {**state, "text": text, "tokens": self._cast(tokens, len(tokens))}
        outputs = self._run("head", values)
        return HeadOutput(outputs["scores"], outputs["logits"], outputs["plan"])

    def _session(self, name: str) -> Any:
        if name not in self._sessions:
            file = self._manifest.graphs[name].file
            self._sessions[name] = open_session(
                self._bundle / file,
                self._device,
                self._threads,
                files=self._manifest.files,
                plan_memory=False,
            )
        return self._sessions[name]

    def _run(self, name: str, values: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run a graph on those of ``values`` that it takes (a graph may need only part of the state)."""
        graph = self._manifest.graphs[name]
        missing = [key for key in graph.inputs if key not in values]
        if missing:
            raise EngineError(f"{graph.file}: needs {', '.join(missing)}; the state is not of this bundle")
        inputs = {key: np.asarray(values[key]) for key in graph.inputs}
        outputs = self._session(name).run(list(graph.outputs), inputs)
        return dict(zip(graph.outputs, outputs, strict=True))

    def _cast(self, tokens: NDArray[np.floating[Any]], rows: int) -> FloatArray:
        """Tokens as float32 ``[rows, M, D]`` in a buffer kept between batches, filled up with the first photo."""
        if len(self._tokens) < rows:
            self._tokens = np.empty((rows, *self._tokens.shape[1:]), np.float32)
        self._tokens[: len(tokens)] = tokens
        self._tokens[len(tokens) : rows] = tokens[0]
        return self._tokens[:rows]
