"""The engine of workstations: text tower and method in PyTorch; on CUDA one graph replays the whole local step.

On CUDA the tower multiplies in bfloat16 while state, residual stream, loss and gradients stay float32; tokens
stay float16, for the Triton kernels. On a CPU everything is float32 and eager, as the reference.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedmpt.edge_client.engine import EngineError, FloatArray, HeadOutput
from fedmpt.export import methods, programs
from fedmpt.export.frozen import load_frozen
from fedmpt.export.methods import METHODS, Setup
from fedmpt.protocol.codec import State
from fedmpt.protocol.manifest import BundleManifest, Tokens, Training, load_manifest

Tensors = Mapping[str, Tensor]
WARM_UP_STEPS = 3  # before capture: compiles the kernels, fills PyTorch's and cuBLAS's caches


class TorchEngine:
    """See :class:`fedmpt.edge_client.engine.Engine`. The step is captured when it is first needed."""

    def __init__(self, bundle: Path, manifest: BundleManifest, device: torch.device, half: bool) -> None:
        self._manifest = manifest
        self._device = device
        setup, weights = load_frozen(bundle)
        self._setup = setup
        self._weights = place_weights(weights, device, half)
        self._step: CapturedStep | None = None
        self._staged: deque[tuple[NDArray[Any], int]] = deque()  # tokens, and the slot that they lie in

    @classmethod
    def open(cls, bundle: Path, device: str = "auto", threads: int | None = None) -> TorchEngine:
        """Open a bundle folder; ``threads`` sets PyTorch's for the whole process.

        Raises:
            BundleError: it is none.
            EngineError: PyTorch cannot use the device.
        """
        if device not in ("auto", "cpu", "cuda"):
            raise EngineError(f"engine torch has no device {device!r}; use cpu or cuda, or --engine onnx")
        if device == "cuda" and not torch.cuda.is_available():
            raise EngineError(
                f"device cuda: this PyTorch ({torch.__version__}) sees no NVIDIA GPU; use --device cpu, or "
                "install a CUDA build of PyTorch and a driver"
            )
        if threads is not None:
            torch.set_num_threads(threads)
        cuda = device != "cpu" and torch.cuda.is_available()
        return cls(bundle, load_manifest(bundle), torch.device("cuda" if cuda else "cpu"), half=cuda)

    def stage(self, tokens: NDArray[np.floating[Any]], labels: NDArray[np.int8]) -> None:
        """Pin the next batch and start its copy to the GPU.

        Meant for a thread that reads ahead while :meth:`train_step` works on the batch before. The call after
        that must be given the same array of tokens, unchanged. On a CPU nothing happens.
        """
        if self._device.type == "cuda":
            self._check_rows(labels)
            self._staged.append((tokens, self._captured().load(tokens, labels)))

    def train_step(
        self, state: State, tokens: NDArray[np.floating[Any]], labels: NDArray[np.int8]
    ) -> tuple[float, State]:
        """See :class:`fedmpt.edge_client.engine.Engine`."""
        self._check_state(state, self._manifest.state)
        if self._device.type == "cpu":
            outputs = _train_step(
                self._setup,
                self._manifest.training,
                self._weights,
                _tensors(state, self._device),
                torch.from_numpy(np.asarray(tokens, np.float32)),
                torch.from_numpy(np.ascontiguousarray(labels)),
            )
            return float(outputs["loss"]), {name: outputs[name].numpy() for name in state}
        self._check_rows(labels)
        while self._staged and self._staged[0][0] is not tokens:
            self._staged.popleft()  # left over from a round that ended early
        slot = self._staged.popleft()[1] if self._staged else self._captured().load(tokens, labels)
        loss, gradients = self._captured().run(state, slot)
        return loss, {name: gradients[name] for name in state}

    def text_features(self, state: State) -> FloatArray:
        """See :class:`fedmpt.edge_client.engine.Engine`."""
        needed = METHODS[self._setup.method].text_state
        self._check_state(state, needed)
        with torch.no_grad():
            tensors = _tensors({name: state[name] for name in needed}, self._device)
            return _array(_text_features(self._setup, self._weights, tensors))

    def head(self, state: State, text: FloatArray, tokens: NDArray[np.floating[Any]]) -> HeadOutput:
        """See :class:`fedmpt.edge_client.engine.Engine`."""
        self._check_state(state, self._manifest.state)
        kind = np.float16 if self._device.type == "cuda" else np.float32
        with torch.no_grad():
            outputs = programs.run_head(
                self._setup,
                _tensors(state, self._device),
                torch.from_numpy(np.asarray(tokens, kind)).to(self._device),
                torch.from_numpy(np.ascontiguousarray(text)).to(self._device),
            )
        return HeadOutput(*(_array(outputs[name]) for name in ("scores", "logits", "plan")))

    def _captured(self) -> CapturedStep:
        if self._step is None:
            training, tokens = self._manifest.training, self._manifest.tokens
            self._step = CapturedStep(self._setup, training, tokens, self._weights, self._device)
        return self._step

    def _check_rows(self, labels: NDArray[np.int8]) -> None:
        rows = self._manifest.training.batch_size
        if len(labels) > rows:
            raise EngineError(f"a batch of {len(labels)} photos, but the bundle's train step takes {rows}")

    def _check_state(self, state: State, needed: Any) -> None:
        missing = [name for name in needed if name not in state]
        if missing:
            raise EngineError(
                f"the {self._setup.method} step needs {', '.join(missing)}; the state is not of this bundle"
            )


@dataclass(frozen=True)
class _Slot:
    """One batch on its way: pinned memory, the GPU's copy, and the event of its arrival."""

    pinned_tokens: Tensor
    pinned_labels: Tensor
    tokens: Tensor
    labels: Tensor
    arrived: torch.cuda.Event

    @classmethod
    def like(cls, tokens: Tensor, labels: Tensor) -> _Slot:
        return cls(
            torch.zeros(tokens.shape, dtype=tokens.dtype, pin_memory=True),
            torch.zeros(labels.shape, dtype=labels.dtype, pin_memory=True),
            torch.empty_like(tokens),
            torch.empty_like(labels),
            torch.cuda.Event(),  # type: ignore[no-untyped-call]
        )


class CapturedStep:
    """The local step as one CUDA graph over fixed buffers; of two slots one is filled while the other is used."""

    def __init__(
        self, setup: Setup, training: Training, tokens: Tokens, weights: Tensors, device: torch.device
    ) -> None:
        shapes = methods.state_shapes(setup)
        self._sizes = {name: int(np.prod(shape)) for name, shape in shapes.items()}
        self._shapes = shapes
        count = sum(self._sizes.values())
        self._state = torch.zeros(count, device=device)
        batch = training.batch_size, len(setup.labels)
        self._tokens = torch.zeros(batch[0], tokens.count, tokens.width, dtype=torch.float16, device=device)
        self._labels = torch.full(batch, -1, dtype=torch.int8, device=device)
        self._slots = [_Slot.like(self._tokens, self._labels) for _ in range(2)]
        self._pinned_state = torch.zeros(count, pin_memory=True)
        self._pinned_results = torch.zeros(count + 1, pin_memory=True)
        self._copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._last_slot = 0

        def step() -> Tensor:
            state = dict(zip(shapes, torch.split(self._state, list(self._sizes.values())), strict=True))
            state = {name: value.view(shapes[name]) for name, value in state.items()}
            outputs = _train_step(setup, training, weights, state, self._tokens, self._labels)
            return torch.cat([outputs["loss"].reshape(1), *(outputs[name].flatten() for name in shapes)])

        warm_up = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        warm_up.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(warm_up):
            for _ in range(WARM_UP_STEPS):
                step()
        torch.cuda.current_stream(device).wait_stream(warm_up)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._results = step()

    def load(self, tokens: NDArray[np.floating[Any]], labels: NDArray[np.int8]) -> int:
        """Pin a batch, filled up with photos of unknown labels, start its copy to the GPU, and tell its slot."""
        self._last_slot = 1 - self._last_slot
        slot = self._slots[self._last_slot]
        slot.arrived.synchronize()
        slot.pinned_tokens.numpy()[: len(tokens)] = tokens
        slot.pinned_labels.numpy()[: len(labels)] = labels
        slot.pinned_labels.numpy()[len(labels) :] = -1
        with torch.cuda.stream(self._copies):
            slot.tokens.copy_(slot.pinned_tokens, non_blocking=True)
            slot.labels.copy_(slot.pinned_labels, non_blocking=True)
            slot.arrived.record()
        return self._last_slot

    def run(self, state: State, slot_number: int) -> tuple[float, State]:
        """Loss and gradients of the batch in a slot."""
        offset = 0
        for name, size in self._sizes.items():
            self._pinned_state.numpy()[offset : offset + size] = state[name].ravel()
            offset += size
        slot = self._slots[slot_number]
        torch.cuda.current_stream().wait_event(slot.arrived)
        self._tokens.copy_(slot.tokens)
        self._labels.copy_(slot.labels)
        self._state.copy_(self._pinned_state, non_blocking=True)
        self._graph.replay()
        self._pinned_results.copy_(self._results, non_blocking=True)
        torch.cuda.current_stream().synchronize()
        results = self._pinned_results.numpy().copy()
        parts = np.split(results[1:], np.cumsum(list(self._sizes.values()))[:-1])
        gradients = {
            name: part.reshape(self._shapes[name]) for name, part in zip(self._sizes, parts, strict=True)
        }
        return float(results[0]), gradients


def _train_step(
    setup: Setup, training: Training, weights: Tensors, state: Tensors, tokens: Tensor, labels: Tensor
) -> dict[str, Tensor]:
    """``loss``, and the gradient of every state tensor under its own name."""
    leaves = {name: value.detach().requires_grad_() for name, value in state.items()}
    text = _text_features(setup, weights, leaves)
    loss = methods.head_loss(setup, training, text, leaves, tokens, labels)
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return {"loss": loss.detach(), **dict(zip(leaves, gradients, strict=True))}


def _text_features(setup: Setup, weights: Tensors, state: Tensors) -> Tensor:
    """Text features in float32; a tower whose matrices are in bfloat16 multiplies in it."""
    half = any(weight.dtype == torch.bfloat16 for weight in weights.values())
    with torch.autocast(weights["position"].device.type, torch.bfloat16, enabled=half, cache_enabled=False):
        return methods.text_features(setup, weights, state).float()


def place_weights(weights: Tensors, device: torch.device, half: bool) -> dict[str, Tensor]:
    """Frozen weights on the device: linear layers in bfloat16 if ``half``; norms, positions, words in float32."""

    def kind(name: str) -> torch.dtype:
        linear = name.endswith((".weight", ".bias")) and "norm" not in name
        return torch.bfloat16 if half and linear else torch.float32

    return {name: weight.to(device, kind(name)) for name, weight in weights.items()}


def _tensors(state: State, device: torch.device) -> dict[str, Tensor]:
    return {name: torch.from_numpy(np.array(value, np.float32)).to(device) for name, value in state.items()}


def _array(tensor: Tensor) -> FloatArray:
    result: FloatArray = tensor.float().cpu().numpy()
    return result
