"""Where the time of a run goes: by stage, and in networks or outside them."""

import contextlib
import functools
import os
import resource
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NETWORK = "networks"


@dataclass(frozen=True, kw_only=True, slots=True)
class Times:
    """One run, in seconds.

    network: in which at least one network ran. cpu: of all threads and of child processes; network_cpu: of threads
    while they run networks. stages: wall and CPU seconds by name, of Python's threads.
    """

    wall: float
    network: float
    cpu: float
    network_cpu: float
    stages: dict[str, tuple[float, float]]

    @property
    def outside(self) -> float:
        return self.wall - self.network

    @property
    def outside_cpu(self) -> float:
        return self.cpu - self.network_cpu


class Stopwatch:
    """Counts what runs inside `stage`, thread by thread; a stage inside a stage does not count for the outer one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._here = threading.local()
        self._pool_threads: set[str] = set()
        self._reset()

    def _reset(self) -> None:
        self._stages: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        self._runs: list[tuple[float, float]] = []

    @contextlib.contextmanager
    def measure(self) -> Iterator[list[Times]]:
        """Measure what happens inside; the list holds its Times afterwards."""
        self._reset()
        result: list[Times] = []
        start, cpu, pool = time.perf_counter(), _cpu_seconds(), self._pool_seconds()
        yield result
        wall, cpu, pool = time.perf_counter() - start, _cpu_seconds() - cpu, self._pool_seconds() - pool
        stages = {name: (seconds, cpu_seconds) for name, (seconds, cpu_seconds) in self._stages.items()}
        network_cpu = stages.get(NETWORK, (0.0, 0.0))[1] + pool
        result.append(Times(wall=wall, network=_covered(self._runs), cpu=cpu, network_cpu=network_cpu, stages=stages))

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the time inside, less that of stages inside."""
        open_stages = self._here.__dict__.setdefault("open", [])
        open_stages.append([0.0, 0.0])
        start, start_cpu = time.perf_counter(), time.thread_time()
        try:
            yield
        finally:
            wall, cpu = time.perf_counter() - start, time.thread_time() - start_cpu
            inner = open_stages.pop()
            if open_stages:
                open_stages[-1][0] += wall
                open_stages[-1][1] += cpu
            with self._lock:
                self._stages[name][0] += wall - inner[0]
                self._stages[name][1] += cpu - inner[1]
                if name == NETWORK:
                    self._runs.append((start, start + wall))

    @contextlib.contextmanager
    def wrapped(self, owner: Any, attribute: str, name: str) -> Iterator[None]:
        """Inside, count every call of a function or method as a stage."""
        function = getattr(owner, attribute)
        setattr(owner, attribute, self.counted(function, name))
        try:
            yield
        finally:
            setattr(owner, attribute, function)

    def counted(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        """The function, whose calls, and the steps of the generator that it may return, count as a stage."""

        @functools.wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            with self.stage(name):
                result = function(*arguments, **options)
            return self._steps(result, name) if hasattr(result, "__next__") else result

        return call

    def _steps(self, items: Iterator[Any], name: str) -> Iterator[Any]:
        with contextlib.closing(items):  # type: ignore[type-var]
            while True:
                with self.stage(name):
                    item = next(items, self)
                if item is self:
                    return
                yield item

    def network(self, open_session: Callable[[], Any]) -> Any:
        """Open an onnxruntime session whose runs, and whose own threads, count as networks."""
        before = set(os.listdir("/proc/self/task"))
        session = open_session()
        self._pool_threads |= set(os.listdir("/proc/self/task")) - before
        return _Counted(session, self)

    def _pool_seconds(self) -> float:
        ticks = 0
        for thread in self._pool_threads:
            fields = Path(f"/proc/self/task/{thread}/stat").read_text().rsplit(")", 1)[1].split()
            ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")


class _Counted:
    def __init__(self, session: Any, watch: Stopwatch) -> None:
        self._session = session
        self.run = watch.counted(session.run, NETWORK)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)


def _cpu_seconds() -> float:
    """Of this process and of children that ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def _covered(intervals: list[tuple[float, float]]) -> float:
    """Length of the union."""
    total, end = 0.0, float("-inf")
    for low, high in sorted(intervals):
        total += max(0.0, high - max(low, end))
        end = max(end, high)
    return total
