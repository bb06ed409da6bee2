"""A function over many tasks in several processes; a task that ends its process does not end the others."""

import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import TypeVar

from preprocessing.side_by_side import num_cores

Task = TypeVar("Task")
Result = TypeVar("Result")
_MOST_PROCESSES = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Crash:
    """What a task gives that ended its process, also when it was alone in it."""


def usable_processes() -> int:
    """Processes that keep this machine's cores busy, at most 16: more wait for the disk."""
    return min(num_cores(), _MOST_PROCESSES)


def map_in_processes(
    function: Callable[[Task], Result], tasks: Iterable[Task], *, num_processes: int
) -> Iterator[tuple[Task, Result | Crash]]:
    """Yield each task with its result, in the order in which they are done. One process: this one.

    Raises what `function` raises.
    """
    waiting = deque(tasks)
    if num_processes == 1:
        yield from ((task, function(task)) for task in waiting)
        return
    while waiting:
        running: dict[Future[Result], Task] = {}
        try:
            with _pool(min(num_processes, len(waiting))) as pool:
                while waiting or running:
                    while waiting and len(running) < 2 * num_processes:
                        future = pool.submit(function, waiting[0])
                        running[future] = waiting.popleft()
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        result = future.result()
                        yield running.pop(future), result
        except BrokenProcessPool:
            # One of the running tasks did it. Alone in a process, each shows whether it was the one.
            for task in running.values():
                yield task, _alone(function, task)


def _alone(function: Callable[[Task], Result], task: Task) -> Result | Crash:
    try:
        with _pool(1) as pool:
            return pool.submit(function, task).result()
    except BrokenProcessPool:
        return Crash()


def _pool(num_processes: int) -> ProcessPoolExecutor:
    """Fresh processes, without the locks and threads of this one; Ctrl-C is left to this one."""
    context = multiprocessing.get_context("spawn")
    ignore = signal.signal, (signal.SIGINT, signal.SIG_IGN)
    return ProcessPoolExecutor(num_processes, mp_context=context, initializer=ignore[0], initargs=ignore[1])
