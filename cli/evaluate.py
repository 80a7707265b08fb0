"""``fedmpt evaluate``: how good a state is on the photos of a feature cache."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from fedmpt.cli.logs import show_logs
from fedmpt.cli.options import load_tuned_state
from fedmpt.cli.progress import progress_bar
from fedmpt.edge_client.cache import open_cache
from fedmpt.edge_client.engine import ENGINES, open_engine
from fedmpt.edge_client.evaluation import Evaluation, evaluate
from fedmpt.edge_client.metrics import Pair
from fedmpt.edge_client.onnx_session import DEVICES
from fedmpt.protocol.errors import FedmptError
from fedmpt.protocol.manifest import load_manifest

DESCRIPTION = """\
Measure a state on the photos of a feature cache: mAP and average precision by label, CF1 and OF1 at probability
0.5, calibration error. With --validation, a cache of other photos, also CF1 and OF1 at thresholds chosen there and the
spurious activation rate: how often label j is predicted where i is present and j is not, at equal recall."""

MAXIMUM_PAIRS_BYTES = 16 << 20


class PairsError(FedmptError):
    """The file of label pairs cannot be read."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Describe the command's options."""
    parser.description = DESCRIPTION
    parser.epilog = (
        "Example:\n"
        "  fedmpt evaluate --bundle bundle/ --state global.safetensors --cache test-cache/ --validation val-cache/"
    )
    parser.add_argument("--bundle", type=Path, required=True, help="folder that `fedmpt bundle` wrote")
    parser.add_argument("--state", type=Path, help="state to measure (the bundle's initial one)")
    parser.add_argument("--cache", type=Path, required=True, help="feature cache of the test photos")
    parser.add_argument("--validation", type=Path, help="feature cache on which thresholds are chosen")
    parser.add_argument(
        "--pairs",
        type=Path,
        metavar="JSON",
        help='label pairs to watch, [["i", "j"], …] (those that go together in the validation photos)',
    )
    parser.add_argument("--engine", choices=ENGINES, default="onnx", help="(%(default)s)")
    parser.add_argument("--device", choices=DEVICES, default="auto", help="where it runs (%(default)s)")
    parser.add_argument("--threads", type=int, help="cores to use (all)")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.set_defaults(usage_error=parser.error)


def run(arguments: argparse.Namespace) -> int:
    """Measure and print."""
    if arguments.pairs and not arguments.validation:
        arguments.usage_error("--pairs needs --validation, where the thresholds of equal recall are chosen")
    if arguments.threads is not None and arguments.threads < 1:
        arguments.usage_error("--threads must be at least 1")
    show_logs()
    manifest = load_manifest(arguments.bundle)
    state = load_tuned_state(arguments.state or arguments.bundle / "state.safetensors", manifest)
    pairs = _read_pairs(arguments.pairs, manifest.labels) if arguments.pairs else None
    cache = open_cache(arguments.cache, manifest)
    validation = open_cache(arguments.validation, manifest) if arguments.validation else None
    if validation and (shared := len(set(cache.hashes) & set(validation.hashes))):
        print(
            f"warning: {shared} of the {len(cache)} photos of {arguments.cache} are in {arguments.validation} too; "
            "figures at thresholds that were chosen on test photos flatter the state",
            file=sys.stderr,
        )
    engine = open_engine(arguments.bundle, arguments.engine, arguments.device, arguments.threads)
    with progress_bar("evaluating") as progress:
        evaluation = evaluate(
            engine, state, cache, manifest.labels, validation=validation, pairs=pairs, progress=progress
        )
    if arguments.json:
        print(json.dumps(evaluation.to_json(), indent=1, ensure_ascii=False))
    else:
        _print(evaluation)
    return 0


def _print(evaluation: Evaluation) -> None:
    figures = {
        "mAP": evaluation.map,
        "CF1": evaluation.cf1,
        "OF1": evaluation.of1,
        "calibration error": evaluation.calibration_error,
        "CF1 at tuned thresholds": evaluation.cf1_tuned,
        "OF1 at tuned thresholds": evaluation.of1_tuned,
        f"spurious activation at recall {evaluation.recall}": evaluation.spurious_activation,
    }
    print(f"photos: {evaluation.photos}")
    for name, value in figures.items():
        if value is not None:
            print(f"{name}: {value:.4f}")
    print("average precision:")
    for label, precision in evaluation.average_precision.items():
        print(f"  {label}: " + ("no photo shows it" if precision is None else f"{precision:.4f}"))


def _read_pairs(path: Path, labels: tuple[str, ...]) -> list[Pair]:
    index = {label: position for position, label in enumerate(labels)}
    try:
        with path.open("rb") as file:
            value = json.loads(file.read(MAXIMUM_PAIRS_BYTES))
        return [(index[i], index[j]) for i, j in value]
    except OSError as error:
        raise PairsError(f"{path}: {error.strerror}") from None
    except KeyError as error:
        raise PairsError(f"{path}: {error} is not a label of the bundle") from None
    except (TypeError, ValueError, RecursionError) as error:
        raise PairsError(f'{path}: not a JSON list of label pairs [["i", "j"], …] ({error})') from None
