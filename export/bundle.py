"""Build a federation bundle: everything that an edge site needs, without PyTorch, to encode, train and predict."""

from __future__ import annotations

import dataclasses
import math
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import onnx
import torch
from torch import Tensor

from fedmpt.export import graphs, methods, programs
from fedmpt.export.clip import TOKEN_KINDS, TOKEN_MODES, ClipCheckpoint
from fedmpt.export.conditions import DEFAULT_CONDITIONS
from fedmpt.export.frozen import TEXT_WEIGHTS, freeze, save_frozen
from fedmpt.export.methods import METHODS
from fedmpt.export.presets import DEFAULT, PAPER_POOLING, PAPER_TRAINING
from fedmpt.export.towers import Weights
from fedmpt.export.verification import verify_graphs
from fedmpt.kernels.reference import POOLINGS
from fedmpt.protocol.codec import save_state
from fedmpt.protocol.errors import FedmptError
from fedmpt.protocol.files import sha256_file, sync_path, write_atomically
from fedmpt.protocol.manifest import (
    FORMAT,
    VERSION,
    BundleManifest,
    Clip,
    Graph,
    Pooling,
    TensorSpec,
    Tokens,
    Training,
    save_manifest,
)

__all__ = ["DEFAULT_CONDITIONS", "PAPER_POOLING", "PAPER_TRAINING", "BuildError", "build_bundle"]

PRECISIONS = ("float32", "float16")
ONNX_FILE_LIMIT = 2**31 - 2**20  # of protobuf, with room for the graph
Progress = Callable[[int, "int | None"], None]


class BuildError(FedmptError):
    """A bundle cannot be built from what was given."""


def build_bundle(
    clip: ClipCheckpoint,
    labels: Sequence[str],
    out: Path,
    *,
    conditions: Sequence[str] = DEFAULT_CONDITIONS,
    method: str = "fedmpt-prompts",
    token_kind: str = "plain",
    token_mode: str = "full",
    pooling: Pooling = DEFAULT.pooling,
    training: Training = DEFAULT.training,
    precision: str = "float32",
    condition_context: int = 4,
    class_context: int = 4,
    adapter_rank: int = 32,
    progress: Progress | None = None,
) -> BundleManifest:
    """Write a bundle folder: four ONNX graphs, the frozen text weights, the initial state and the manifest.

    Every graph is checked, and run in ONNX Runtime against PyTorch, before the folder appears under its name.

    Args:
        labels: C unique names, of one or several words.
        out: must not exist, or be empty.
        conditions: N unique phrases; methods without conditions leave them out.
        precision: ``float32`` or ``float16`` of the frozen weights on disk; sums stay float32.
        condition_context, class_context: learned tokens per condition, and before the label.
        adapter_rank: of ``fedmpt-full``.

    Raises:
        BuildError: labels or conditions are unusable, a choice is unknown, or the folder is taken.
        PromptError: a prompt is too long or not in the tokenizer's vocabulary.
        VerificationError: a graph does not compute what PyTorch computes.
    """
    _check_choice("method", method, METHODS)
    _check_choice("tokens", token_kind, TOKEN_KINDS)
    _check_choice("token mode", token_mode, TOKEN_MODES)
    _check_choice("precision", precision, PRECISIONS)
    _check_choice("pooling", pooling.name, POOLINGS)
    for what, size in (
        ("tau", pooling.tau),
        ("reg", pooling.reg),
        ("iterations", pooling.iterations),
        ("batch size", training.batch_size),
        ("condition context", condition_context),
        ("class context", class_context),
        ("adapter rank", adapter_rank),
    ):
        if not 0 < size < math.inf:
            raise BuildError(f"{what} is {size}; it must be above 0 and finite")
    _check_unique("label", labels)
    _check_unique("condition", conditions)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BuildError(f"{out}: exists already; remove it or give another folder")
    if not METHODS[method].conditioned:
        conditions = ()
    setup, weights = freeze(
        clip,
        labels,
        conditions,
        method,
        pooling,
        condition_context=condition_context,
        class_context=class_context,
        adapter_rank=adapter_rank,
    )
    stored, weights = _store_as(weights, precision)
    stored_vision, vision = _store_as(clip.vision, precision)
    if sum(tensor.nbytes for tensor in stored_vision.values()) >= ONNX_FILE_LIMIT:
        raise BuildError(
            f"{clip.name}: its image encoder exceeds ONNX's 2 GiB a file; use --precision float16"
        )
    clip = dataclasses.replace(clip, vision=vision)
    state = methods.initial_state(setup, training.seed)
    count, grid = _token_grid(clip, token_mode)
    tokens = Tokens(token_kind, token_mode, count, grid, setup.width)

    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        save_frozen(folder, setup, stored)
        save_state(folder / "state.safetensors", {name: value.numpy() for name, value in state.items()})
        described: dict[str, Graph] = {}
        traces: dict[str, Callable[[], onnx.ModelProto]] = {
            "image_encoder": lambda: programs.trace_image_encoder(clip, token_kind, token_mode),
            "train_step": lambda: programs.trace_train_step(setup, training, weights, state, count),
            "text_features": lambda: programs.trace_text_features(setup, weights, state),
            "head": lambda: programs.trace_head(setup, weights, state, count),
        }
        for done, (name, trace) in enumerate(traces.items()):
            if progress:
                progress(done, 5)
            if name == "image_encoder":
                model = graphs.place_weights(trace(), stored_vision, None)
            else:
                model = graphs.place_weights(trace(), stored, folder / TEXT_WEIGHTS)
            described[name] = _write_graph(folder / f"{name}.onnx", model)
        if progress:
            progress(4, 5)
        manifest = BundleManifest(
            format=FORMAT,
            version=VERSION,
            method=method,
            labels=tuple(labels),
            conditions=tuple(conditions),
            clip=Clip(
                name=clip.name,
                licence=clip.licence,
                image_size=clip.image_size,
                patch_size=clip.patch_size,
                width=setup.width,
                text_width=setup.text_width,
                logit_scale=clip.logit_scale,
            ),
            tokens=tokens,
            pooling=pooling,
            training=training,
            precision=precision,
            state={name: TensorSpec("float32", tuple(value.shape)) for name, value in state.items()},
            graphs=described,
            files={path.name: sha256_file(path) for path in sorted(folder.iterdir())},
        )
        verify_graphs(folder, manifest, clip, setup, weights, state)
        save_manifest(folder, manifest)
        folder.chmod(0o755)
        if out.exists():
            out.rmdir()
        folder.replace(out)
        sync_path(out.parent)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    if progress:
        progress(5, 5)
    return manifest


def _token_grid(clip: ClipCheckpoint, mode: str) -> tuple[int, tuple[int, int]]:
    """M, the class token included, and rows and columns of the patches."""
    rows, columns = clip.grid
    if mode == "pooled":
        rows, columns = -(-rows // 2), -(-columns // 2)
    return 1 + rows * columns, (rows, columns)


def _store_as(weights: Weights, precision: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights as stored, and the float32 values that they stand for."""
    stored = {name: tensor.to(getattr(torch, precision)).contiguous() for name, tensor in weights.items()}
    return stored, {name: tensor.float() for name, tensor in stored.items()}


def _write_graph(path: Path, model: onnx.ModelProto) -> Graph:
    write_atomically(path, model.SerializeToString(deterministic=True))
    onnx.checker.check_model(path, full_check=True)
    return Graph(path.name, graphs.describe(model.graph.input), graphs.describe(model.graph.output))


def _check_choice(kind: str, value: str, known: Iterable[str]) -> None:
    if value not in known:
        raise BuildError(f"{kind} {value!r} is unknown; choose one of {', '.join(known)}")


def _check_unique(kind: str, names: Sequence[str]) -> None:
    if not names:
        raise BuildError(f"no {kind}s are given; give at least one")
    seen: dict[str, str] = {}
    for name in names:
        key = " ".join(name.split()).casefold()
        if not key or name != name.strip():
            raise BuildError(f"{kind} {name!r} is empty or starts or ends with a space; mend the list")
        if key in seen:
            raise BuildError(f"{kind} {name!r} is given twice (as {seen[key]!r}); keep one")
        seen[key] = name
