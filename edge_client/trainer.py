"""A site's part of one round, as plain functions on arrays: no network, no clock but the one passed in."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedmpt.edge_client.calibration import fit_scale_and_bias
from fedmpt.edge_client.engine import Engine, EngineError, Progress, predict
from fedmpt.edge_client.metrics import class_f1, mean_average_precision, overall_f1
from fedmpt.edge_client.optimizers import OPTIMIZERS, clip_gradients, cosine_rate
from fedmpt.protocol.codec import State
from fedmpt.protocol.errors import FedmptError
from fedmpt.protocol.manifest import BundleManifest
from fedmpt.protocol.messages import Manifest

Rows = NDArray[np.int64]


class TrainingError(FedmptError):
    """A round cannot be trained with this data or set-up."""


class TrainingStopped(Exception):
    """``should_stop`` said so; what was trained since the last checkpoint is lost."""


@dataclass(frozen=True)
class SiteData:
    """A site's cached photos: ``tokens`` float16 ``[n, M, D]`` (a memory map), ``labels`` int8 ``[n, C]``.

    ``train`` and ``validation`` are row numbers; no row is in both.
    """

    tokens: NDArray[np.float16]
    labels: NDArray[np.int8]
    train: Rows
    validation: Rows


@dataclass(frozen=True)
class LocalUpdate:
    """What a site returns: the difference to the received state, how many photos, figures by name.

    ``metrics``: ``loss`` (mean over the last epoch, or after calibration) and, of the *received* state on
    the ``validation_samples`` held-out photos, ``mAP``, ``CF1`` and ``OF1``.
    """

    difference: State
    samples: int
    validation_samples: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class Checkpoint:
    """A round after ``epochs`` finished epochs: enough to go on as if nothing had happened."""

    epochs: int
    state: State
    memory: State
    loss: float


def train_round(
    engine: Engine,
    data: SiteData,
    state: State,
    manifest: BundleManifest | Manifest,
    *,
    round_number: int,
    client: str,
    seed: int,
    resume: Checkpoint | None = None,
    on_epoch: Callable[[Checkpoint], None] | None = None,
    out_of_time: Callable[[], bool] | None = None,
    should_stop: Callable[[], bool] | None = None,
    progress: Progress | None = None,
) -> LocalUpdate:
    """Train the received state on a site's photos for one round.

    The same arguments give the same bits: batches come from (seed, client, round) alone, the optimiser starts
    at zero, and a round that is resumed from a checkpoint equals one that was never interrupted.

    Args:
        engine: loss and gradients.
        data: the site's photos.
        state: the received global state; not changed.
        manifest: the bundle's or the federation's; its ``training`` says how to train.
        round_number: 1 … ``training.rounds``.
        client: the site's name.
        seed: the federation's seed.
        resume: where to go on, from an earlier ``on_epoch``.
        on_epoch: called with a checkpoint after every epoch but the last.
        out_of_time: asked after each batch; True ends the training with what has been reached so far. The metrics
            of the received state are then still measured, on the whole validation split.
        should_stop: asked before each batch; True raises ``TrainingStopped``.
        progress: called with (batches done, batches in all).

    Raises:
        TrainingError: no training photo has a known label, or the optimiser is unknown.
        EngineError: a loss or gradient is not finite.
        TrainingStopped: see ``should_stop``.
    """
    training = manifest.training
    rows = _labelled(data)
    if training.optimizer not in OPTIMIZERS:
        raise TrainingError(
            f"optimizer {training.optimizer!r} in the bundle's manifest is unknown here; "
            f"known: {', '.join(OPTIMIZERS)}; update fedmpt-edge or make the bundle again"
        )
    step = OPTIMIZERS[training.optimizer]
    rate = cosine_rate(training.learning_rate, round_number, training.rounds)
    rates = {
        name: rate * (1.0 if value.ndim else training.scalar_rate_factor) for name, value in state.items()
    }
    point = resume or Checkpoint(0, state, {}, 0.0)
    current, memory, loss = point.state, point.memory, point.loss
    batches = -(-len(rows) // training.batch_size)
    timed_out = False
    for epoch, order in enumerate(_orders(len(rows), training.epochs, seed, client, round_number)):
        if epoch < point.epochs or timed_out:
            continue
        total, seen = 0.0, 0
        size = training.batch_size
        # Sorted, so that the memory map is read forwards; the loss is a sum over the batch.
        chosen = [np.sort(rows[order[start : start + size]]) for start in range(0, len(rows), size)]
        for batch, (tokens, labels) in enumerate(_read_ahead(engine, data, chosen)):
            if should_stop and should_stop():
                raise TrainingStopped
            batch_loss, gradients = engine.train_step(current, tokens, labels)
            _check_finite(batch_loss, gradients)
            gradients = clip_gradients(gradients, training.gradient_clip)
            current, memory = step(
                current, gradients, memory, rates, training.momentum, training.weight_decay
            )
            total, seen = total + batch_loss * len(labels), seen + len(labels)
            if progress:
                progress(epoch * batches + batch + 1, training.epochs * batches)
            if out_of_time and out_of_time():
                timed_out = True
                break
        loss = total / seen
        if on_epoch and not timed_out and epoch + 1 < training.epochs:
            on_epoch(Checkpoint(epoch + 1, current, memory, loss))
    metrics = {"loss": loss, **received_metrics(engine, data, state, training.batch_size, should_stop)}
    return LocalUpdate(_difference(current, state), len(rows), len(data.validation), metrics)


def calibrate(
    engine: Engine,
    data: SiteData,
    state: State,
    manifest: BundleManifest | Manifest,
    *,
    out_of_time: Callable[[], bool] | None = None,
    should_stop: Callable[[], bool] | None = None,
    progress: Progress | None = None,
) -> LocalUpdate:
    """Round 0: fit ``scale`` and ``bias`` on the head's scores; the difference holds these two alone.

    Args:
        engine, data, state, manifest, should_stop: as for :func:`train_round`.
        out_of_time: asked after each batch; True fits on the photos scored so far, a random part of all.
        progress: called with (photos scored, photos in all).

    Raises:
        TrainingError: no training photo has a known label.
        EngineError: a score is not finite.
        TrainingStopped: see ``should_stop``.
    """
    rows, batch_size = _labelled(data), manifest.training.batch_size
    watch = _stoppable(should_stop, progress)
    order = np.random.default_rng(0).permutation(len(rows))
    scores, _ = predict(
        engine,
        state,
        data.tokens,
        rows[order],
        batch_size=batch_size,
        progress=watch,
        out_of_time=out_of_time,
    )
    scored = order[: len(scores)]
    rows, scores = rows[np.sort(scored)], scores[np.argsort(scored)]
    scale, bias, loss = fit_scale_and_bias(
        scores, data.labels[rows], float(state["scale"]), float(state["bias"]), manifest.training
    )
    fitted = {"scale": np.asarray(scale, np.float32), "bias": np.asarray(bias, np.float32)}
    metrics = {"loss": loss, **received_metrics(engine, data, state, batch_size, should_stop)}
    return LocalUpdate(_difference(fitted, state), len(rows), len(data.validation), metrics)


def received_metrics(
    engine: Engine,
    data: SiteData,
    state: State,
    batch_size: int,
    should_stop: Callable[[], bool] | None = None,
) -> dict[str, float]:
    """mAP, CF1 and OF1 (threshold 0.5) of a state on the validation split, left out where undefined."""
    if not len(data.validation):
        return {}
    watch, rows = _stoppable(should_stop), data.validation
    _, logits = predict(engine, state, data.tokens, rows, batch_size=batch_size, progress=watch)
    labels = data.labels[rows]
    figures = {
        "mAP": mean_average_precision(logits, labels),
        "CF1": class_f1(logits >= 0, labels),
        "OF1": overall_f1(logits >= 0, labels),
    }
    return {name: value for name, value in figures.items() if math.isfinite(value)}


def _stoppable(should_stop: Callable[[], bool] | None, progress: Progress | None = None) -> Progress:
    """``progress`` that raises TrainingStopped where ``should_stop`` says so."""

    def after_batch(done: int, total: int | None) -> None:
        if progress:
            progress(done, total)
        if should_stop and should_stop():
            raise TrainingStopped

    return after_batch


def generator(seed: int, client: str, round_number: int) -> np.random.Generator:
    """The generator of a client's round; SHA-256 makes the seeds of neighbours independent."""
    digest = hashlib.sha256(f"{seed}\n{round_number}\n{client}".encode()).digest()
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(int.from_bytes(digest, "little"))))


def _orders(
    count: int, epochs: int, seed: int, client: str, round_number: int
) -> Iterator[NDArray[np.int64]]:
    """One shuffled order of the photos per epoch."""
    random = generator(seed, client, round_number)
    for _ in range(epochs):
        yield random.permutation(count)


def _read_ahead(
    engine: Engine, data: SiteData, batches: Sequence[Rows]
) -> Iterator[tuple[NDArray[np.float16], NDArray[np.int8]]]:
    """Tokens and labels of each batch; a thread reads the next one from disk, and moves it to the engine's device.

    The second half is for engines that have a ``stage(tokens, labels)``: they get the same arrays later.
    """
    stage = getattr(engine, "stage", None)

    def read(rows: Rows) -> tuple[NDArray[np.float16], NDArray[np.int8]]:
        batch = data.tokens[rows], data.labels[rows]
        if stage:
            stage(*batch)
        return batch

    with ThreadPoolExecutor(1) as reader:
        ahead = reader.submit(read, batches[0])
        for rows in batches[1:]:
            batch = ahead.result()
            ahead = reader.submit(read, rows)
            yield batch
        yield ahead.result()


def _labelled(data: SiteData) -> Rows:
    """The training rows with a known label; the others would only thin out the batches."""
    rows = data.train[(data.labels[data.train] >= 0).any(axis=1)]
    if not len(rows):
        raise TrainingError(
            f"none of this site's {len(data.train)} training photos has a known label; "
            "label some photos and build the feature cache again"
        )
    return rows


def _difference(after: State, before: State) -> State:
    return {name: np.asarray(value - before[name]) for name, value in after.items()}


def _check_finite(loss: float, gradients: State) -> None:
    wrong = [name for name, value in gradients.items() if not np.isfinite(value).all()]
    if wrong or not np.isfinite(loss):
        raise EngineError(
            f"the train step gave a number that is not finite (loss {loss}, gradients: "
            f"{', '.join(wrong) or 'fine'}); check the received state, the feature cache and the precision"
        )
