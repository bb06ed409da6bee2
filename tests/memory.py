"""How much anonymous memory (no file stands behind it) something needs at once, in a process of its own (`ranks`)."""

import ctypes
import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_M_MMAP_THRESHOLD = -3  # of mallopt


def anonymous_bytes() -> int:
    """What this process holds now."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError("this kernel does not say RssAnon")


@contextmanager
def peak_anonymous_bytes(interval_seconds: float = 0.01) -> Iterator[list[int]]:
    """The most memory above what there was before, sampled; a list of one, filled at the end.

    From here on malloc returns every block of 64 KiB and more to the kernel when it is freed. It would keep freed
    tensors otherwise, by chance up to twice as much as is in use.
    """
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_THRESHOLD, 2**16)
    gc.collect()
    libc.malloc_trim(0)
    before, peak, done = anonymous_bytes(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(interval_seconds):
            peak[0] = max(peak[0], anonymous_bytes() - before)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()
        peak[0] = max(peak[0], anonymous_bytes() - before)
