"""The Prometheus endpoint, asked over HTTP as Prometheus would."""

from __future__ import annotations

import socket
import urllib.request

import pytest

from fedmpt.aggregator.monitoring import MonitoringError, serve_metrics
from fedmpt.protocol.messages import Status

STATUS = Status(
    federation="farm",
    online=True,
    round=3,
    rounds=10,
    phase="train",
    present=4,
    chosen=3,
    received=2,
    refused=1,
    muted=0,
    deadline=None,
    waiting="",
    metrics={"mAP": 0.75},
    time=0.0,
)


def test_the_endpoint_shows_the_latest_status() -> None:
    statuses: list[Status | None] = [None]
    server = serve_metrics(0, lambda: statuses[0])
    try:
        url = f"http://127.0.0.1:{server.server_port}/metrics"
        assert "fedmpt_round" not in urllib.request.urlopen(url, timeout=5).read().decode()
        statuses[0] = STATUS
        lines = urllib.request.urlopen(url, timeout=5).read().decode().splitlines()
    finally:
        server.shutdown()
        server.server_close()
    assert {"fedmpt_round 3.0", "fedmpt_updates_refused 1.0", 'fedmpt_validation{metric="mAP"} 0.75'} <= set(
        lines
    )


def test_a_taken_port_is_a_clear_error() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(MonitoringError, match=rf"cannot listen on 127\.0\.0\.1:{port}"):
            serve_metrics(port, lambda: None)
