"""A Prometheus endpoint for the aggregator's operator; off unless a port is given."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import GaugeMetricFamily, Metric

from fedmpt.protocol.errors import FedmptError
from fedmpt.protocol.messages import Status


class MonitoringError(FedmptError):
    """The metrics endpoint cannot listen on its port."""


class _StatusCollector:
    """Turns the aggregator's latest status into gauges at the moment Prometheus asks."""

    def __init__(self, latest: Callable[[], Status | None]) -> None:
        self._latest = latest

    def collect(self) -> Iterator[Metric]:
        status = self._latest()
        if status is None:
            return
        gauges = {
            "round": ("Number of the open round", status.round),
            "rounds": ("Rounds planned", status.rounds),
            "clients_present": ("Clients online", status.present),
            "clients_chosen": ("Clients chosen for the open round", status.chosen),
            "clients_muted": ("Clients muted for the open round", status.muted),
            "updates_received": ("Updates accepted in the open round", status.received),
            "updates_refused": ("Updates refused in the open round", status.refused),
        }
        for name, (text, number) in gauges.items():
            yield GaugeMetricFamily(f"fedmpt_{name}", text, value=number)
        family = GaugeMetricFamily(
            "fedmpt_validation",
            "Sample-weighted validation figure of the last closed round",
            labels=["metric"],
        )
        for name, value in sorted(status.metrics.items()):
            family.add_metric([name], value)
        yield family


def serve_metrics(port: int, latest: Callable[[], Status | None], host: str = "127.0.0.1") -> WSGIServer:
    """Serve ``/metrics`` from a background thread; ``shutdown()`` of the returned server ends it.

    Raises:
        MonitoringError: the port is taken.
    """
    registry = CollectorRegistry()
    registry.register(_StatusCollector(latest))
    try:
        server, _ = start_http_server(port, addr=host, registry=registry)
    except OSError as error:
        raise MonitoringError(
            f"metrics: cannot listen on {host}:{port} ({error.strerror}); choose another port"
        ) from error
    return server
