"""``fedmpt export``: bundle and tuned state to one ``tagger.onnx``."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from fedmpt.export.tagger import export_tagger
from fedmpt.protocol.codec import load_provenance, load_state
from fedmpt.protocol.manifest import load_manifest


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``fedmpt export``."""
    parser.description = "Make one self-contained tagger.onnx of a bundle and a tuned state."
    parser.epilog = "Example: fedmpt export --bundle bundle/ --state final.safetensors --out tagger.onnx"
    parser.add_argument("--bundle", type=Path, required=True, help="folder that `fedmpt bundle` wrote")
    parser.add_argument("--state", type=Path, required=True, help="tuned state (.safetensors)")
    parser.add_argument("--out", type=Path, default=Path("tagger.onnx"), help="file to write (%(default)s)")
    parser.add_argument(
        "--no-heatmaps", dest="heatmaps", action="store_false", help="leave the region heat maps out"
    )
    parser.add_argument("--json", action="store_true", help="print the tagger's description as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Export and report."""
    manifest = load_manifest(arguments.bundle)
    state = load_state(arguments.state, manifest.state)
    info = export_tagger(
        arguments.bundle,
        state,
        arguments.out,
        heatmaps=arguments.heatmaps,
        provenance=load_provenance(arguments.state),
    )
    if arguments.json:
        print(json.dumps(dataclasses.asdict(info), ensure_ascii=False))
    else:
        size = arguments.out.stat().st_size / 1e6
        print(f"{arguments.out}: {len(info.labels)} labels, {info.precision}, {size:.1f} MB")
    return 0
