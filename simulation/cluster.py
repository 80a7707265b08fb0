"""Spreads independent tasks over processes and machines with Dask distributed.

Dask, because it is plain Python (also on arm64), needs no service of its own, sends functions and small results
and leaves files alone; Ray brings an object store and daemons of which such tasks use nothing.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from fedmpt.protocol.errors import FedmptError

Item = TypeVar("Item")
Result = TypeVar("Result")


class ClusterError(FedmptError):
    """The cluster cannot be used, or a task failed on it."""


# spread(function, items, done): calls done(index, result) as each item finishes, in any order.
Spread = Callable[[Callable[[Any], Any], Sequence[Any], Callable[[int, Any], None]], None]


@contextmanager
def open_cluster(workers: int = 1, scheduler: str | None = None) -> Iterator[Spread]:
    """Yield a function that spreads tasks: here and now, over local processes, or over a running cluster.

    Args:
        workers: processes of one thread each; 1 runs everything in this process.
        scheduler: address of a running Dask scheduler (``tcp://host:8786``) instead; its workers must see the
            same files under the same paths.

    Raises:
        ClusterError: Dask is not installed, or the scheduler cannot be reached.
    """
    if scheduler is None and workers <= 1:
        yield _here
        return
    try:
        # Dask has type hints but for a few functions; imported this way it is simply untyped.
        distributed: Any = importlib.import_module("distributed")
    except ModuleNotFoundError as error:
        raise ClusterError(
            f"{error.name} is not installed; pip install 'fedmpt-edge[cluster]', or use --workers 1"
        ) from error
    if scheduler is None:
        # Memory is bounded by the tasks themselves; Dask would count the memory maps and kill workers.
        cluster = distributed.LocalCluster(
            n_workers=workers,
            threads_per_worker=1,
            memory_limit=0,
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",  # any free port: a second experiment may run beside this one
        )
        with cluster, distributed.Client(cluster) as client:
            yield _over(client, distributed.as_completed)
        return
    try:
        client = distributed.Client(scheduler, timeout="10s")
    except OSError as error:
        raise ClusterError(f"no Dask scheduler answers at {scheduler} ({error})") from error
    with client:
        yield _over(client, distributed.as_completed)


def _here(
    function: Callable[[Item], Result], items: Sequence[Item], done: Callable[[int, Result], None]
) -> None:
    for index, item in enumerate(items):
        done(index, function(item))


def _over(client: Any, as_completed: Any) -> Spread:
    def spread(
        function: Callable[[Item], Result], items: Sequence[Item], done: Callable[[int, Result], None]
    ) -> None:
        # Not pure: a task writes files, so an equal one of an earlier call must not stand in for it.
        futures = client.map(function, items, pure=False)
        places = {future.key: index for index, future in enumerate(futures)}
        try:
            for future in as_completed(futures):
                done(places[future.key], future.result())
                future.release()
        finally:
            client.cancel(futures)

    return spread
