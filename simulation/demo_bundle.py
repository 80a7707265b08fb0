"""Rebuild the demo's shipped bundle: ``python -m fedmpt.simulation.demo_bundle`` (needs the workstation extra).

It comes from the shipped micro-CLIP and the federation's labels. Beside it stand the text features of
"a photo of a {label}.", with which the untuned CLIP is measured.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from safetensors.numpy import save

from fedmpt.protocol.codec import load_state
from fedmpt.protocol.files import write_atomically
from fedmpt.simulation.demo import BUNDLE, DATA, ZERO_SHOT
from fedmpt.simulation.scenes_sets import FEDERATION_LABELS

METHOD = "fedmpt-full"
PRECISION = "float16"


def build_demo_bundle(bundle: Path = BUNDLE, zero_shot: Path = ZERO_SHOT) -> None:
    """Write the demo's bundle and the untuned text features, replacing what is there."""
    from fedmpt.edge_client.engine import open_engine
    from fedmpt.export.bundle import build_bundle
    from fedmpt.export.clip import load_clip

    clip = load_clip(str(DATA / "micro-clip"))
    shutil.rmtree(bundle, ignore_errors=True)
    build_bundle(clip, FEDERATION_LABELS, bundle, method=METHOD, precision=PRECISION)
    with tempfile.TemporaryDirectory() as scratch:
        untuned = Path(scratch) / "zero-shot"
        manifest = build_bundle(clip, FEDERATION_LABELS, untuned, method="zero-shot", precision=PRECISION)
        state = load_state(untuned / "state.safetensors", manifest.state)
        text = open_engine(untuned, "onnx", "cpu").text_features(state)
    write_atomically(zero_shot, save({"text": text[0].copy()}))


if __name__ == "__main__":
    build_demo_bundle()
