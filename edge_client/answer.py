"""A site's answer to a round, the same whether it goes over MQTT or stays in one process."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from fedmpt.edge_client.engine import Engine, Progress
from fedmpt.edge_client.trainer import Checkpoint, SiteData, calibrate, train_round
from fedmpt.protocol.codec import State, Update, state_digest
from fedmpt.protocol.messages import Manifest


def answer_round(
    engine: Engine,
    data: SiteData,
    state: State,
    manifest: Manifest,
    *,
    phase: str,
    round_number: int,
    client: str,
    resume: Checkpoint | None = None,
    on_epoch: Callable[[Checkpoint], None] | None = None,
    out_of_time: Callable[[], bool] | None = None,
    should_stop: Callable[[], bool] | None = None,
    progress: Progress | None = None,
) -> Update:
    """Calibrate or train from ``state`` as the federation's manifest says; metrics only if it asks for them.

    The arguments and errors are those of :func:`~fedmpt.edge_client.trainer.train_round`.
    """
    if not manifest.metrics:
        data = dataclasses.replace(data, validation=data.validation[:0])
    if phase == "calibrate":
        local = calibrate(
            engine,
            data,
            state,
            manifest,
            out_of_time=out_of_time,
            should_stop=should_stop,
            progress=progress,
        )
    else:
        local = train_round(
            engine,
            data,
            state,
            manifest,
            round_number=round_number,
            client=client,
            seed=manifest.training.seed,
            resume=resume,
            on_epoch=on_epoch,
            out_of_time=out_of_time,
            should_stop=should_stop,
            progress=progress,
        )
    return Update(
        federation=manifest.federation,
        round=round_number,
        client=client,
        base=state_digest(state),
        samples=local.samples,
        validation_samples=local.validation_samples,
        metrics=local.metrics if manifest.metrics else {},
        difference=local.difference,
    )
