"""Batches that run side by side: while one is in the network, another is prepared or read."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
_MOST_STREAMS = 2


class SideBySide:
    """Works on two batches at a time where `num_threads` (0: as many as there are cores) allows, else on one.

    threads_each: for the network, inside one batch. Two batches with half the threads each get more done than one with
    all of them, whose threads wait for each other at every operator: on 2 cores the demo's detector and pose network
    take 2 % and 9 % less time, and 40 % less where the cores have other work too (benchmarks/preprocess.py --streams).
    """

    def __init__(self, num_threads: int) -> None:
        num_threads = num_threads or num_cores()
        self._num_streams = min(_MOST_STREAMS, num_threads)
        self.threads_each = num_threads // self._num_streams
        self._pool = ThreadPoolExecutor(self._num_streams, thread_name_prefix="network")

    def __call__(self, function: Callable[[_Item], _Result], items: Iterable[_Item]) -> Iterator[_Result]:
        """Yield `function` of each item, in order; one more item than streams has been taken and begun ahead.

        Where `items` raises, that comes after the results of the items before.
        """
        begun: deque[Future[_Result]] = deque()
        taken, failure = iter(items), None
        while True:
            try:
                begun.append(self._pool.submit(function, next(taken)))
            except StopIteration:
                break
            except Exception as error:
                failure = error
                break
            if len(begun) > self._num_streams:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()
        if failure is not None:
            raise failure


def num_cores() -> int:
    """Cores that this process may use, which a batch system may have made fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
