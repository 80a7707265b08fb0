"""``fedmpt bundle``: prepare a federation bundle from a CLIP checkpoint and labels."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from fedmpt.cli.progress import progress_bar
from fedmpt.protocol.errors import FedmptError
from fedmpt.protocol.manifest import BundleManifest


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.epilog = (
        "Example: fedmpt bundle --clip openai/clip-vit-base-patch16 --tokens clearclip --labels labels.txt "
        "--out bundle/"
    )
    add = parser.add_argument
    add("--clip", required=True, metavar="FOLDER|NAME", help="Hugging Face CLIPModel folder or hub name")
    add("--labels", required=True, type=Path, help="text file, one label per line")
    add("--out", required=True, type=Path, help="bundle folder to write; must not exist yet")
    add("--conditions", type=Path, help="text file, one condition per line (default: the paper's five)")
    add(
        "--method",
        default="fedmpt-prompts",
        help="fedmpt-prompts (default), fedmpt-full, coop, dualcoop, positivecoop or zero-shot",
    )
    add(
        "--tokens",
        default="plain",
        help="plain (default; best on the project's own CLIP), maskclip, or clearclip, which the literature "
        "recommends for checkpoints whose patches were not trained to match text, such as OpenAI's",
    )
    add("--token-mode", default="full", help="full (default), or pooled: a quarter of the feature cache")
    add("--preset", default="default", help="default, or paper: the paper's pooling and training set-up")
    add("--pooling", help="transport, softmax or max (default: the preset's)")
    add("--tau", type=float, help="τ, divides the scaled similarities before pooling (default: the preset's)")
    add(
        "--reg",
        type=float,
        help="λ, the entropy weight of transport: smaller is sharper (default: the preset's)",
    )
    add("--iterations", type=int, help="of Sinkhorn's algorithm (default: the preset's)")
    add("--condition-context", type=int, default=4, help="learned tokens before each condition (default 4)")
    add("--class-context", type=int, default=4, help="learned tokens before each label (default 4)")
    add("--rank", type=int, default=32, help="of the adapters and the gate of fedmpt-full (default 32)")
    add("--precision", default="float32", help="of the frozen weights on disk: float32 (default) or float16")
    add("--batch-size", type=int, help="photos per training step (default: the preset's)")
    add("--seed", type=int, default=0, help="of the initial state and of the batches (default 0)")
    add("--licence", help="of the CLIP weights (default: what its model card says)")
    add("--json", action="store_true", help="print the summary as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Build the bundle and print what it holds."""
    labels = read_lines(arguments.labels)
    conditions = read_lines(arguments.conditions) if arguments.conditions else None
    # Imported late: PyTorch takes seconds, and wrong usage should not.
    from fedmpt.export.bundle import DEFAULT_CONDITIONS, BuildError, build_bundle
    from fedmpt.export.clip import load_clip
    from fedmpt.export.presets import PRESETS

    if arguments.preset not in PRESETS:
        raise BuildError(f"preset {arguments.preset!r} is unknown; choose one of {', '.join(PRESETS)}")
    preset = PRESETS[arguments.preset]
    training = dataclasses.replace(preset.training, seed=arguments.seed)
    if arguments.batch_size is not None:
        training = dataclasses.replace(training, batch_size=arguments.batch_size)
    pooling: dict[str, Any] = {
        "name": arguments.pooling,
        "tau": arguments.tau,
        "reg": arguments.reg,
        "iterations": arguments.iterations,
    }
    given = {name: value for name, value in pooling.items() if value is not None}
    clip = load_clip(arguments.clip, arguments.licence)
    with progress_bar("building the bundle") as progress:
        manifest = build_bundle(
            clip,
            labels,
            arguments.out,
            conditions=conditions or DEFAULT_CONDITIONS,
            method=arguments.method,
            token_kind=arguments.tokens,
            token_mode=arguments.token_mode,
            pooling=dataclasses.replace(preset.pooling, **given),
            training=training,
            precision=arguments.precision,
            condition_context=arguments.condition_context,
            class_context=arguments.class_context,
            adapter_rank=arguments.rank,
            progress=progress,
        )
    summary = summarise(manifest, arguments.out)
    print(json.dumps(summary) if arguments.json else describe(summary))
    return 0


def summarise(manifest: BundleManifest, folder: Path) -> dict[str, Any]:
    """What a site downloads, keeps and sends: counts and bytes."""
    parameters = {name: math.prod(map(int, spec.shape)) for name, spec in manifest.state.items()}
    total = sum(parameters.values())
    return {
        "bundle": str(folder),
        "digest": manifest.digest,
        "method": manifest.method,
        "labels": len(manifest.labels),
        "conditions": len(manifest.conditions),
        "tokens": f"{manifest.tokens.count} × {manifest.tokens.width}, {manifest.tokens.kind}, {manifest.tokens.mode}",
        "cached_bytes_per_photo": 2 * manifest.tokens.count * manifest.tokens.width,
        "parameters": parameters,
        "trained_parameters": total,
        "update_bytes": {"float32": 4 * total, "float16": 2 * total, "int8": total},
        "files": {name: (folder / name).stat().st_size for name in manifest.files},
    }


def describe(summary: dict[str, Any]) -> str:
    """The summary in lines for people."""
    update = summary["update_bytes"]
    lines = [
        f"{summary['bundle']}: {summary['method']}, {summary['labels']} labels, "
        f"{summary['conditions']} conditions, digest {summary['digest'][:12]}",
        f"image tokens {summary['tokens']}: {summary['cached_bytes_per_photo']:,} bytes cached per photo",
        f"trained {summary['trained_parameters']:,} parameters; an update is {update['float32']:,} bytes in "
        f"float32, {update['float16']:,} in float16, {update['int8']:,} in int8",
    ]
    lines += [f"  {name:<20}{count:>12,}" for name, count in summary["parameters"].items()]
    lines += ["files (bytes)"]
    lines += [f"  {name:<28}{size:>14,}" for name, size in summary["files"].items()]
    return "\n".join(lines)


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 text file, stripped; empty lines and lines that start with # are left out.

    Raises:
        FedmptError: missing, not text, or nothing in it.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise FedmptError(
            f"{path}: cannot be read as UTF-8 text ({error}); give one name per line"
        ) from error
    lines = [line for line in lines if line and not line.startswith("#")]
    if not lines:
        raise FedmptError(f"{path}: holds no names; give one per line")
    return lines
