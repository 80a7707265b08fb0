"""Experiments as TOML files: shared settings, grids of values, plots; every combination is one run.

title = "Spurious correlation"
question = "Does the method ignore labels that merely occur together?"
[settings]                       # what all runs share; every key is a field of Settings
rounds = 8
[[grid]]                         # the product of the lists; several grids are joined
method = ["coop", "fedmpt-full"]
strength = [0.0, 0.9]
seed = [0, 1, 2]
[[plot]]
x = "strength"
y = ["decorrelated.mAP"]
by = "method"
[[compare]]                      # each run minus the run of the same seed that these values single out
against = {strength = 0.0}
within = ["method"]              # in which both agree
y = ["decorrelated.spurious activation"]
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import itertools
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedmpt.protocol.errors import FedmptError
from fedmpt.protocol.manifest import canonical_json

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SHIPPED = Path(__file__).parent / "data" / "experiments"


class ExperimentError(FedmptError):
    """An experiment's file is missing or says something that cannot be run."""


@dataclass(frozen=True)
class Settings:
    """Everything that decides one run's result, seed included. An empty text or a zero: the default.

    Data: ``data`` scenes, voc, coco or nus-wide (``root``: the photo set's folder); ``strength`` of the
    planted correlations (scenes); at most ``photos`` for training and ``test_photos`` (0: all); ``masked``: the
    fraction of the training annotations that is hidden, then ``ignored`` or taken as ``negative``.

    Federation: ``partition`` own (scenes: every client its own correlations), iid, dirichlet (``alpha``) or
    clusters (``clusters``); a fraction ``participation`` of the ``clients`` is chosen each round and each
    vanishes with probability ``dropout``; ``centralised``: all photos at one client. A fraction ``hostile`` of
    the clients sends an ``attack`` (see :mod:`fedmpt.simulation.attacks`) instead of its updates.

    Method: what the bundle is built from; ``trained``: the groups of tensors that learn, joined by ``+``.
    """

    data: str = "scenes"
    root: str = ""
    clip: str = "micro-clip"
    strength: float = 0.9
    photos: int = 1200
    test_photos: int = 600
    masked: float = 0.0
    unknown: str = "ignored"
    partition: str = "own"
    clients: int = 6
    clusters: int = 1
    alpha: float = 1.0
    participation: float = 1.0
    dropout: float = 0.0
    centralised: bool = False
    hostile: float = 0.0
    attack: str = ""
    strategy: str = "uniform"
    encoding: str = "float32"
    method: str = "fedmpt-prompts"
    trained: str = ""
    tokens: str = ""
    token_mode: str = ""
    pooling: str = ""
    tau: float = 0.0
    reg: float = 0.0
    iterations: int = 0
    context: int = 0
    rank: int = 0
    rounds: int = 8
    epochs: int = 1
    batch_size: int = 32
    optimizer: str = ""
    learning_rate: float = 0.0
    calibrate: bool = True
    seed: int = 0


FIELDS = {field.name: field for field in dataclasses.fields(Settings)}
# Numbers of which zero means: what the preset or the bundle's builder says.
PRESET_FIELDS = frozenset({"tau", "reg", "iterations", "context", "rank", "learning_rate"})

# What a run measures: on every set of test photos, and once.
TEST_METRICS = (
    "mAP",
    "CF1",
    "OF1",
    "CF1 tuned",
    "OF1 tuned",
    "CF1 best of 9",
    "OF1 best of 9",
    "recall",
    "spurious activation",
    "unplanted activation",
)
RUN_METRICS = ("clients.mAP", "divergence", "bytes per update", "updates", "seconds")


def metric_names(settings: Settings) -> tuple[str, ...]:
    """The names of all figures of a run, as plots and comparisons ask for them."""
    tests = ("decorrelated", "correlated") if settings.data == "scenes" else ("test",)
    return (*(f"{test}.{metric}" for test in tests for metric in TEST_METRICS), *RUN_METRICS)


@dataclass(frozen=True)
class Run:
    """One combination: its settings and the values that tell it from the others (``variant`` included)."""

    settings: Settings
    variant: str

    @property
    def key(self) -> str:
        """Names the run's result: equal settings have equal results, in whatever experiment."""
        fields = dataclasses.asdict(self.settings)
        if not self.settings.attack:
            del fields["attack"], fields["hostile"]  # nobody attacks, so it does not matter who might
        return hashlib.sha256(canonical_json(fields)).hexdigest()[:20]


@dataclass(frozen=True)
class Plot:
    """Mean and interval over seeds of the metrics ``y`` over ``x``, one line for each combination of ``by``.

    ``only`` leaves out runs of other variants. Fields that are neither ``x`` nor ``by`` must not differ.
    """

    x: str
    y: tuple[str, ...]
    by: tuple[str, ...]
    only: str | None


@dataclass(frozen=True)
class Comparison:
    """Paired differences of the metrics ``y``: each run minus its partner, over the seeds.

    A run's partner has the same seed, the same values of the fields ``within`` and the values ``against``. Runs
    without a partner are left out, and so are the partners themselves.
    """

    against: dict[str, Any]
    within: tuple[str, ...]
    y: tuple[str, ...]

    def partner_key(self, run: Run) -> tuple[Any, ...]:
        """What a run and its partner have in common."""
        return (run.settings.seed, *(value_of(run, field) for field in self.within))

    def singles_out(self, run: Run) -> bool:
        """Whether the run is a partner of others."""
        return all(value_of(run, field) == value for field, value in self.against.items())


@dataclass(frozen=True)
class Experiment:
    """A parsed file.

    ``differing`` are the fields (and ``variant``) in which its runs differ, but for the seed; ``varying`` those
    of them that tell the runs apart: the variant's name, but no field that follows from others, such as each
    method's own learning rate.
    """

    name: str
    title: str
    question: str
    runs: tuple[Run, ...]
    plots: tuple[Plot, ...]
    comparisons: tuple[Comparison, ...]
    differing: tuple[str, ...]
    varying: tuple[str, ...]


def load_experiment(name: str, changes: Sequence[str] = ()) -> Experiment:
    """Read an experiment by path, or by the name of a shipped one.

    Args:
        changes: shared settings to change, each as ``key=value`` with the value as TOML writes it (quotes
            around text may be left out).

    Raises:
        ExperimentError: not found, not TOML, an unknown key or a value of the wrong kind.
    """
    path = Path(name) if name.endswith(".toml") else SHIPPED / f"{name}.toml"
    try:
        value = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        shipped = ", ".join(sorted(file.stem for file in SHIPPED.glob("*.toml")))
        raise ExperimentError(f"{path}: not found; give a TOML file or one of {shipped}") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ExperimentError(f"{path}: cannot be read as TOML ({error})") from error
    for change in changes:
        key, sign, text = change.partition("=")
        if not sign:
            raise ExperimentError(f"--set {change}: write it as KEY=VALUE")
        try:
            parsed = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            parsed = text
        value.setdefault("settings", {})[key.strip()] = parsed
    return parse_experiment(path.stem, value, str(path))


def parse_experiment(name: str, value: Mapping[str, Any], where: str) -> Experiment:
    """Check a parsed TOML document and expand its grids; ``where`` starts the text of errors."""
    _known(value, ("title", "question", "settings", "grid", "plot", "compare"), where)
    shared = dict(value.get("settings", {}))
    _known(shared, FIELDS, f"{where}: [settings]")
    runs: list[Run] = []
    for grid in value.get("grid", [{}]):
        _known(grid, ("variant", *FIELDS), f"{where}: [[grid]]")
        axes = {key: item if isinstance(item, list) else [item] for key, item in grid.items()}
        variant = axes.pop("variant", [""])[0]
        for values in itertools.product(*axes.values()):
            fields = {**shared, **dict(zip(axes, values, strict=True))}
            settings = Settings(**{key: _converted(key, item, where) for key, item in fields.items()})
            try:
                runs.append(Run(settings, str(variant).format(**vars(settings))))
            except (KeyError, IndexError, ValueError) as error:
                raise ExperimentError(f"{where}: variant = {variant!r}: {error} is no setting") from None
    differing = tuple(
        field
        for field in ("variant", *FIELDS)
        if field != "seed" and len({value_of(run, field) for run in runs}) > 1
    )
    metrics = list(dict.fromkeys(name for run in runs for name in metric_names(run.settings)))
    plots = []
    for plot in value.get("plot", []):
        _known(plot, ("x", "y", "by", "only"), f"{where}: [[plot]]")
        by, y = _listed(plot.get("by", [])), _listed(plot.get("y", []))
        _known((plot.get("x", ""), *by), ("variant", *FIELDS), f"{where}: [[plot]]")
        _known(y, metrics, f"{where}: [[plot]]: y", "metric")
        plots.append(Plot(plot["x"], y, by, plot.get("only")))
    return Experiment(
        name,
        str(value.get("title", name)),
        str(value.get("question", "")),
        tuple(runs),
        tuple(plots),
        tuple(_comparison(item, runs, metrics, f"{where}: [[compare]]") for item in value.get("compare", [])),
        differing,
        _telling_apart(runs, differing),
    )


def value_of(run: Run, field: str) -> Any:
    """A run's value in one of the experiment's ``varying`` fields."""
    return run.variant if field == "variant" else getattr(run.settings, field)


def shown_value(field: str, value: Any) -> str:
    """A setting as tables and plots show it; a dash where the preset or the method decides."""
    if value == "" or (not value and field in PRESET_FIELDS):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _comparison(
    value: Mapping[str, Any], runs: Sequence[Run], metrics: Sequence[str], where: str
) -> Comparison:
    _known(value, ("against", "within", "y"), where)
    comparison = Comparison(
        dict(value.get("against", {})), _listed(value.get("within", [])), _listed(value.get("y", []))
    )
    _known((*comparison.against, *comparison.within), ("variant", *FIELDS), where)
    _known(comparison.y, metrics, f"{where}: y", "metric")
    keys = [comparison.partner_key(run) for run in runs if comparison.singles_out(run)]
    if len(set(keys)) != len(keys):
        raise ExperimentError(f"{where}: against: several runs of one seed match; name more fields")
    return comparison


def _listed(value: str | Sequence[str]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


def _telling_apart(runs: Sequence[Run], differing: Sequence[str]) -> tuple[str, ...]:
    """What is left when each field, from the last, is dropped if the others tell the runs apart without it."""
    kept = list(differing)

    def kinds(fields: Sequence[str]) -> int:
        return len({tuple(value_of(run, field) for field in fields) for run in runs})

    for field in reversed(differing):
        others = [name for name in kept if name != field]
        if field != "variant" and kinds(others) == kinds(differing):
            kept = others
    return tuple(kept)


def _converted(key: str, value: Any, where: str) -> Any:
    kind = type(FIELDS[key].default)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise ExperimentError(f"{where}: {key} = {value!r}: expected {kind.__name__}")
    return value


def _known(keys: Iterable[str], known: Iterable[str], where: str, what: str = "key") -> None:
    for key in keys:
        if key not in (names := list(known)):
            near = difflib.get_close_matches(key, names, 1) if what == "key" else []
            hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(names)}"
            raise ExperimentError(f"{where}: unknown {what} {key!r}{hint}")
