"""Shared by the engines' tests: the tiny bundle's manifest and first state, and batches for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from fedmpt.protocol.codec import State, load_state
from fedmpt.protocol.manifest import BundleManifest, load_manifest

Batch = tuple[NDArray[np.float16], NDArray[np.int8]]


@pytest.fixture(scope="session")
def manifest(tiny_bundle: Path) -> BundleManifest:
    return load_manifest(tiny_bundle)


@pytest.fixture(scope="session")
def state(tiny_bundle: Path, manifest: BundleManifest) -> State:
    return load_state(tiny_bundle / "state.safetensors", manifest.state)


@pytest.fixture(scope="session")
def draw_batch(manifest: BundleManifest) -> Callable[..., Batch]:
    """Draws ``count`` photos: unit tokens ``[count, M, D]`` and labels ``[count, C]``, unknown ones among them."""

    def draw(count: int, seed: int = 0) -> Batch:
        random = np.random.default_rng(seed)
        tokens = random.normal(size=(count, manifest.tokens.count, manifest.tokens.width))
        tokens /= np.linalg.norm(tokens, axis=-1, keepdims=True)
        labels = random.integers(-1, 2, size=(count, len(manifest.labels)))
        return tokens.astype(np.float16), labels.astype(np.int8)

    return draw
