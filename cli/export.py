"""``fedmpt export``: bundle and tuned state to one ``tagger.onnx``."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedmpt.cli.logs import show_logs
from fedmpt.cli.options import load_tuned_state, require_writable
from fedmpt.cli.progress import ProgressCallback, progress_bar
from fedmpt.edge_client.cache import FeatureCache, open_cache
from fedmpt.edge_client.engine import open_engine, predict
from fedmpt.edge_client.images import PhotoError, load_pixels
from fedmpt.edge_client.labels import Labels
from fedmpt.edge_client.metrics import mean_average_precision
from fedmpt.edge_client.probabilities import calibrate_probabilities
from fedmpt.edge_client.tagger import Tagger
from fedmpt.edge_client.tagging import Tagged, find_photos, tag_photos
from fedmpt.export.tagger import Calibration, export_tagger
from fedmpt.export.tagger_graph import ExportError
from fedmpt.export.tagger_precision import PRECISIONS
from fedmpt.protocol.codec import load_provenance
from fedmpt.protocol.manifest import BundleManifest, load_manifest
from fedmpt.protocol.tagger_info import Measurement

DESCRIPTION = """\
Make one self-contained tagger.onnx of a bundle and a tuned state, and model-card.md beside it.

With --validation, a feature cache of labelled photos, the thresholds of the labels and the temperature of the
probabilities are chosen and measured. Never give the test set: thresholds that were chosen on it flatter it.

float16 and int8 are smaller, and faster where the device has arithmetic for them. What they cost is measured on the
photos of the validation cache, and nothing is written if it is more than --max-loss."""

MAXIMUM_LOSS = {"float16": 0.3, "int8": 1.0}  # points of mean average precision
MEASURED_TEMPERATURE = 10.0  # at which float32 probabilities still tell logits of ±100 apart
RANGE_PHOTOS = 64  # enough for the ranges of activations
BATCH_SIZE = 8


def configure(parser: argparse.ArgumentParser) -> None:
    """Describe the command's options."""
    parser.description = DESCRIPTION
    parser.epilog = (
        "Examples:\n"
        "  fedmpt export --bundle bundle/ --state final.safetensors --out tagger.onnx --validation val-cache/\n"
        "  fedmpt export --bundle bundle/ --state final.safetensors --validation val-cache/ --precision int8 "
        "--photos photos/"
    )
    parser.add_argument("--bundle", type=Path, required=True, help="folder that `fedmpt bundle` wrote")
    parser.add_argument("--state", type=Path, required=True, help="tuned state (.safetensors)")
    parser.add_argument("--out", type=Path, default=Path("tagger.onnx"), help="file to write (%(default)s)")
    parser.add_argument("--validation", type=Path, metavar="CACHE", help="feature cache of labelled photos")
    parser.add_argument(
        "--wanted-precision",
        type=float,
        metavar="P",
        help="choose thresholds at which a fraction P of the tags given is right (those of best F1)",
    )
    parser.add_argument("--precision", choices=PRECISIONS, default="float32", help="of weights (%(default)s)")
    parser.add_argument(
        "--photos",
        action="append",
        metavar="DIR",
        help=f"photos, {RANGE_PHOTOS} are enough, that int8 adapts to",
    )
    parser.add_argument(
        "--max-loss",
        type=float,
        metavar="POINTS",
        help="of mAP that the precision may cost (float16 0.3, int8 1)",
    )
    parser.add_argument(
        "--no-heatmaps", dest="heatmaps", action="store_false", help="leave the region heat maps out"
    )
    parser.add_argument("--json", action="store_true", help="print the tagger's description as JSON")
    parser.set_defaults(usage_error=parser.error)


def run(arguments: argparse.Namespace) -> int:
    """Calibrate, export, report."""
    _check_usage(arguments)
    require_writable(arguments.out)
    show_logs()
    manifest = load_manifest(arguments.bundle)
    state = load_tuned_state(arguments.state, manifest)
    validation = open_cache(arguments.validation, manifest) if arguments.validation else None
    calibration = measurement = measure = None
    provenance = dict(load_provenance(arguments.state))
    if validation and arguments.precision == "float32":
        with progress_bar("calibrating") as progress:
            _, logits = predict(open_engine(arguments.bundle), state, validation.tokens, progress=progress)
        calibration, measurement = _calibrate(arguments, manifest, logits, validation.labels)
    elif validation:
        calibration = Calibration([0.5] * len(manifest.labels), MEASURED_TEMPERATURE)
        measure = functools.partial(_measure, arguments, manifest, validation)
    if arguments.photos:
        names = ", ".join(Path(source).name for source in arguments.photos)
        provenance["ranges of int8"] = f"found on photos of {names} (--photos)"
    info = export_tagger(
        arguments.bundle,
        state,
        arguments.out,
        calibration=calibration,
        heatmaps=arguments.heatmaps,
        provenance=provenance,
        measurement=measurement,
        precision=arguments.precision,
        photos=_range_photos(arguments.photos or [], manifest.clip.image_size),
        measure=measure,
    )
    if arguments.json:
        print(json.dumps(dataclasses.asdict(info), ensure_ascii=False))
        return 0
    size = arguments.out.stat().st_size / 1e6
    print(f"{arguments.out}: {len(info.labels)} labels, {info.precision}, {size:.1f} MB")
    if info.measurement.photos:
        for name, value in dataclasses.asdict(info.measurement).items():
            if value is not None:
                print(
                    f"  {name}: {round(value, 4) + 0.0:.4f}"
                    if isinstance(value, float)
                    else f"  {name}: {value}"
                )
    else:
        print("  not calibrated: every threshold is 0.5 (--validation chooses them)", file=sys.stderr)
    return 0


def _check_usage(arguments: argparse.Namespace) -> None:
    if arguments.wanted_precision is not None:
        if not 0 < arguments.wanted_precision <= 1:
            arguments.usage_error("--wanted-precision must be above 0 and at most 1")
        if not arguments.validation:
            arguments.usage_error("--wanted-precision needs --validation")
    if arguments.precision != "float32" and not arguments.validation:
        arguments.usage_error(
            f"--precision {arguments.precision} needs --validation, to measure what it costs"
        )
    if (arguments.precision == "int8") != bool(arguments.photos):
        arguments.usage_error("--precision int8 and --photos DIR need each other")


def _calibrate(
    arguments: argparse.Namespace, manifest: BundleManifest, logits: NDArray[np.floating], labels: Labels
) -> tuple[Calibration, Measurement]:
    """Thresholds, temperature and figures from a file's logits on the validation photos."""
    found = calibrate_probabilities(logits, labels, arguments.wanted_precision)
    rule = "those of best F1 for each label"
    if arguments.wanted_precision is not None:
        rule = f"the lowest at which a fraction {arguments.wanted_precision:g} of the tags given is right"
    if found.missed:
        missed = ", ".join(manifest.labels[c] for c in found.missed)
        rule += f"; no threshold reaches that for {missed}, which got the one with the most tags right"
    unseen = [
        label for label, shown in zip(manifest.labels, (labels == 1).any(axis=0), strict=True) if not shown
    ]
    if unseen:
        rule += f"; 0.5 for labels that no photo shows: {', '.join(unseen)}"
        print(f"no validation photo shows {', '.join(unseen)}: threshold 0.5", file=sys.stderr)
    measurement = Measurement(
        photos=len(logits),
        source=f"{arguments.validation.name} (--validation)",
        map=_finite(mean_average_precision(logits, labels)),
        calibration_error_before=_finite(found.error_before),
        calibration_error_after=_finite(found.error_after),
        rule=rule,
    )
    return Calibration(found.thresholds, found.temperature), measurement


def _measure(
    arguments: argparse.Namespace,
    manifest: BundleManifest,
    validation: FeatureCache,
    exact: Path,
    reduced: Path,
) -> tuple[Calibration, Measurement]:
    """The reduced file's calibration, and what it costs; raises ExportError if that is above the limit."""
    precision = arguments.precision
    limit = MAXIMUM_LOSS[precision] if arguments.max_loss is None else arguments.max_loss
    paths = [Path(path) for path in validation.paths]
    with progress_bar("measuring float32") as progress:
        before = _predict_photos(Tagger.load(exact, many=True), paths, progress)
    with progress_bar(f"measuring {precision}") as progress:
        after = _predict_photos(Tagger.load(reduced, many=True), paths, progress)
    rows = np.flatnonzero(~np.isnan(before).any(axis=1))
    if not len(rows):
        raise ExportError(
            f"--precision {precision}: none of the validation cache's photos is where it was ({paths[0]}, …), so "
            "its cost cannot be measured; run where the cache was built"
        )
    if np.isnan(after[rows]).any():
        raise ExportError(
            f"--precision {precision}: gives probabilities that are no numbers; nothing was written"
        )
    calibration, measurement = _calibrate(arguments, manifest, after[rows], validation.labels[rows])
    possible = mean_average_precision(before[rows], validation.labels[rows])
    cost = possible - mean_average_precision(after[rows], validation.labels[rows])
    if not cost * 100 <= limit:
        raise ExportError(
            f"--precision {precision} costs {100 * cost:.2f} points of mean average precision, more than --max-loss "
            f"{limit:g}; nothing was written. Give more or more typical --photos, or another precision"
        )
    reference = f"{100 * possible:.2f} in float32 on {len(rows)} photos"
    return calibration, dataclasses.replace(measurement, cost=cost, reference=reference)


def _predict_photos(tagger: Tagger, paths: list[Path], progress: ProgressCallback) -> NDArray[np.float64]:
    """Logits ``[n, C]``; NaN for a photo that cannot be read and for what is no number."""
    probabilities = np.full((len(paths), len(tagger.info.labels)), np.nan)
    for row, result in enumerate(tag_photos(tagger, paths, min_probability=0.0)):
        if isinstance(result, Tagged):
            found = dict(result.tags)
            probabilities[row] = [found.get(label, np.nan) for label in tagger.info.labels]
        progress(row + 1, len(paths))
    probabilities = np.clip(probabilities, 1e-30, 1 - 2.0**-24)
    logits: NDArray[np.float64] = tagger.info.temperature * np.log(probabilities / (1 - probabilities))
    return logits


def _range_photos(sources: list[str], size: int) -> Iterator[NDArray[np.uint8]]:
    """Batches of evenly spaced photos for int8; those that cannot be read are left out."""
    paths = list(find_photos(sources))
    readable = itertools.islice(_readable(paths[:: max(1, len(paths) // RANGE_PHOTOS)], size), RANGE_PHOTOS)
    batch = list(itertools.islice(readable, BATCH_SIZE))
    if sources and not batch:
        raise ExportError(f"--photos {' '.join(sources)}: no photo in it can be read")
    while batch:
        yield np.stack(batch)
        batch = list(itertools.islice(readable, BATCH_SIZE))


def _readable(paths: list[Path], size: int) -> Iterator[NDArray[np.uint8]]:
    for path in paths:
        try:
            yield load_pixels(path, size)
        except PhotoError as error:
            print(f"left out: {error}", file=sys.stderr)


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None
