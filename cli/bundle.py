"""``fedmpt bundle``: prepare a federation bundle from a CLIP checkpoint and labels."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from fedmpt.cli.progress import progress_bar
from fedmpt.protocol.errors import FedmptError


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.epilog = (
        "Example: fedmpt bundle --clip openai/clip-vit-base-patch16 --labels labels.txt --out bundle/"
    )
    parser.add_argument(
        "--clip", required=True, metavar="FOLDER|NAME", help="Hugging Face CLIPModel folder or hub name"
    )
    parser.add_argument("--labels", required=True, type=Path, help="text file, one label per line")
    parser.add_argument("--out", required=True, type=Path, help="bundle folder to write; must not exist yet")
    parser.add_argument(
        "--conditions", type=Path, help="text file, one condition per line (default: the paper's five)"
    )
    parser.add_argument(
        "--method",
        default="fedmpt-prompts",
        help="fedmpt-prompts (default), fedmpt-full, coop, dualcoop, positivecoop or zero-shot",
    )
    parser.add_argument("--tokens", default="clearclip", help="plain, maskclip or clearclip (default)")
    parser.add_argument(
        "--token-mode", default="full", help="full (default) or pooled: a quarter of the cache"
    )
    parser.add_argument("--precision", default="float32", help="of the frozen weights: float32 or float16")
    parser.add_argument("--licence", help="of the CLIP weights (default: what its model card says)")
    parser.add_argument("--json", action="store_true", help="print a summary as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Build the bundle and print what it holds."""
    labels = read_lines(arguments.labels)
    conditions = read_lines(arguments.conditions) if arguments.conditions else None
    # Imported late: PyTorch takes seconds, and wrong usage should not.
    from fedmpt.export.bundle import DEFAULT_CONDITIONS, build_bundle
    from fedmpt.export.clip import load_clip

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
            precision=arguments.precision,
            progress=progress,
        )
    print(json.dumps(dataclasses.asdict(manifest)) if arguments.json else manifest.digest)
    return 0


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
