"""The same tasks give the same results here, over local processes and over a running cluster."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from fedmpt.protocol.errors import FedmptError
from fedmpt.simulation.cluster import ClusterError, Spread, open_cluster


def squares_by_process(spread: Spread) -> tuple[list[int], set[int]]:
    """The squares of 0 … 5, and the processes that computed them."""
    results: dict[int, tuple[int, int]] = {}
    # A lambda travels by value: workers cannot import this test module.
    spread(lambda number: (number * number, os.getpid()), range(6), results.__setitem__)
    return [results[index][0] for index in range(6)], {process for _, process in results.values()}


def failing() -> Callable[[int], None]:
    def fail(number: int) -> None:
        raise FedmptError(f"task {number} cannot be done")

    return fail


@pytest.fixture(scope="module")
def local_cluster() -> Iterator[Any]:
    from distributed import LocalCluster

    with LocalCluster(
        n_workers=2, threads_per_worker=1, memory_limit=0, dashboard_address="127.0.0.1:0", host="127.0.0.1"
    ) as cluster:
        yield cluster


def test_one_worker_runs_in_this_process() -> None:
    with open_cluster() as spread:
        assert squares_by_process(spread) == ([0, 1, 4, 9, 16, 25], {os.getpid()})


def test_several_workers_are_other_processes() -> None:
    with open_cluster(workers=2) as spread:
        results, processes = squares_by_process(spread)
    assert results == [0, 1, 4, 9, 16, 25]
    assert os.getpid() not in processes


def test_a_running_cluster_is_used_by_its_address(local_cluster: Any) -> None:
    with open_cluster(scheduler=local_cluster.scheduler_address) as spread:
        results, processes = squares_by_process(spread)
    assert results == [0, 1, 4, 9, 16, 25]
    assert os.getpid() not in processes


def test_the_error_of_a_task_arrives_as_it_was_raised(local_cluster: Any) -> None:
    with (
        open_cluster(scheduler=local_cluster.scheduler_address) as spread,
        pytest.raises(FedmptError, match="task 3 cannot be done"),
    ):
        spread(failing(), [3], lambda index, result: None)


@pytest.mark.slow
def test_a_scheduler_that_does_not_answer_is_named() -> None:
    with (
        pytest.raises(ClusterError, match=r"no Dask scheduler answers at tcp://127\.0\.0\.1:9"),
        open_cluster(scheduler="tcp://127.0.0.1:9"),
    ):
        pass
