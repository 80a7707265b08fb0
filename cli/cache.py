"""``fedmpt cache``: a site's labelled photos become a feature cache."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from fedmpt.cli.logs import show_logs
from fedmpt.cli.progress import progress_bar
from fedmpt.edge_client.cache import CacheReport, build_cache
from fedmpt.edge_client.datasets import (
    DatasetError,
    LabelledPhoto,
    read_coco,
    read_folder,
    read_selection,
    read_voc,
)
from fedmpt.edge_client.labels import LabelRules
from fedmpt.edge_client.onnx_session import DEVICES
from fedmpt.protocol.manifest import load_manifest

DESCRIPTION = """\
Encode labelled photos into a feature cache, once. PHOTOS is
  a folder with labels.csv (header path,labels or path,labels,unknown; names joined by ;), or
  a PASCAL VOC folder (Annotations, JPEGImages), or
  the folder of the photos of a COCO instances file (--coco).

Run it again after photos were added, removed or relabelled: only new contents are encoded. A run that was
stopped goes on where it was. Photos that cannot be read are left out and listed at the end."""

EXIT_CODES = """\
Exit code 0, also when some photos could not be read (with --strict: 1); 1 if none could or anything else failed.

Examples:
  fedmpt cache photos/ --bundle bundle/ --out cache/
  fedmpt cache VOC2007/ --bundle bundle/ --out cache/ --split trainval --map tvmonitor=tv
  fedmpt cache images/ --coco instances.json --ignore-other-labels --bundle bundle/ --out cache/"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Describe the command's options."""
    parser.description = DESCRIPTION
    parser.epilog = EXIT_CODES
    parser.add_argument("photos", type=Path, metavar="PHOTOS", help="folder of the labelled photos")
    parser.add_argument("--bundle", type=Path, required=True, help="folder that `fedmpt bundle` wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder of the feature cache")
    parser.add_argument(
        "--coco", type=Path, metavar="JSON", help="COCO instances file that labels the photos"
    )
    parser.add_argument(
        "--split",
        metavar="FILE",
        help="use only the photos named in this file, one a line; for VOC also a name as in ImageSets/Main",
    )
    parser.add_argument(
        "--map",
        action="append",
        default=[],
        type=_renaming,
        metavar="OLD=NEW",
        help="take the name OLD for the federation's label NEW; repeat for more",
    )
    parser.add_argument(
        "--ignore-label",
        action="append",
        default=[],
        metavar="NAME",
        help="leave out a name; repeat for more",
    )
    parser.add_argument(
        "--ignore-other-labels", action="store_true", help="leave out every name that is no label"
    )
    parser.add_argument(
        "--unknown-as-negative",
        action="store_true",
        help="take unknown labels as absent (the paper's benchmark)",
    )
    parser.add_argument(
        "--difficult-unknown",
        action="store_true",
        help="VOC: a label whose objects are all marked difficult is unknown, not present",
    )
    parser.add_argument(
        "--device", choices=DEVICES, default="auto", help="where the encoder runs (%(default)s)"
    )
    parser.add_argument("--threads", type=int, help="cores to use (all)")
    parser.add_argument(
        "--batch-size",
        type=int,
        default=4,
        help="photos that a core encodes at once; 32 suits a GPU (%(default)s)",
    )
    parser.add_argument("--strict", action="store_true", help="exit with 1 if any photo could not be read")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.set_defaults(usage_error=parser.error)


def run(arguments: argparse.Namespace) -> int:
    """Read the labels, build the cache, report."""
    if arguments.batch_size < 1 or (arguments.threads is not None and arguments.threads < 1):
        arguments.usage_error("--batch-size and --threads must be at least 1")
    show_logs()
    manifest = load_manifest(arguments.bundle)
    photos = _read(arguments, manifest.labels)
    with progress_bar("encoding photos") as progress:
        report = build_cache(
            photos,
            arguments.bundle,
            arguments.out,
            device=arguments.device,
            threads=arguments.threads,
            batch_size=arguments.batch_size,
            progress=progress,
        )
    shown = np.any([photo.labels == 1 for photo in photos], axis=0)
    absent = [label for label, present in zip(manifest.labels, shown, strict=True) if not present]
    (_print_json if arguments.json else _print)(arguments, report, absent)
    return 1 if arguments.strict and report.failed else 0


def _read(arguments: argparse.Namespace, labels: tuple[str, ...]) -> list[LabelledPhoto]:
    folder: Path = arguments.photos
    rules = LabelRules(
        labels,
        mapping=dict(arguments.map),
        ignored=frozenset(arguments.ignore_label),
        ignore_others=arguments.ignore_other_labels,
        unknown_as_negative=arguments.unknown_as_negative,
    )
    if not folder.is_dir():
        raise DatasetError(f"{folder}: no such folder; give the folder of the labelled photos")
    selection = None
    if arguments.split:
        named = folder / "ImageSets" / "Main" / f"{arguments.split}.txt"
        selection = read_selection(named if named.is_file() else Path(arguments.split))
    if arguments.coco:
        return read_coco(arguments.coco, folder, rules, selection=selection)
    if (folder / "Annotations").is_dir():
        return read_voc(folder, rules, selection=selection, difficult_unknown=arguments.difficult_unknown)
    if not (folder / "labels.csv").exists():
        raise DatasetError(
            f"{folder}: holds neither labels.csv nor Annotations (PASCAL VOC); for a COCO file give --coco"
        )
    return read_folder(folder, rules, selection=selection)


def _print(arguments: argparse.Namespace, report: CacheReport, absent: list[str]) -> None:
    print(
        _printable(
            f"{arguments.out}: {report.photos} photos ({report.encoded} encoded, {report.dropped} dropped, "
            f"{len(report.duplicates)} copies of others)"
        )
    )
    if absent:
        print(f"labels that no photo shows: {', '.join(absent)}", file=sys.stderr)
    if report.contradictions:
        print("copies whose labels contradict; those are unknown until the files agree:", file=sys.stderr)
        for first, second in report.contradictions:
            print(f"  {first} and {second}", file=sys.stderr)
    if report.failed:
        print(f"{len(report.failed)} photos could not be read:", file=sys.stderr)
        for error in report.failed:
            print(f"  {error}", file=sys.stderr)


def _print_json(arguments: argparse.Namespace, report: CacheReport, absent: list[str]) -> None:
    value = {
        "cache": str(arguments.out),
        "photos": report.photos,
        "encoded": report.encoded,
        "dropped": report.dropped,
        "duplicates": [str(path) for path in report.duplicates],
        "contradictions": [[str(first), str(second)] for first, second in report.contradictions],
        "failed": [{"path": str(error.path), "reason": error.reason} for error in report.failed],
        "absent_labels": absent,
    }
    print(_printable(json.dumps(value, indent=1, ensure_ascii=False)))


def _printable(text: str) -> str:
    """Text that may hold file names that are no Unicode, with those bytes escaped as JSON does."""
    return text.encode("utf-8", "backslashreplace").decode()


def _renaming(text: str) -> tuple[str, str]:
    old, separator, new = text.partition("=")
    if not (old.strip() and separator and new.strip()):
        raise argparse.ArgumentTypeError(f"{text!r} is not OLD=NEW")
    return old, new
