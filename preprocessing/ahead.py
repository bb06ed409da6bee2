"""Work done ahead in a thread: decoding goes on while networks run."""

import threading
from collections.abc import Generator, Iterator
from queue import Queue
from typing import Any, TypeVar

_Item = TypeVar("_Item")


def ahead(items: Iterator[_Item]) -> Generator[_Item, None, None]:
    """Give the items of an iterator, which runs one item ahead in a thread of its own.

    What it raises is raised here. Closing this generator ends the thread.
    """
    queue: Queue[tuple[str, Any]] = Queue(maxsize=1)
    stop = threading.Event()

    def fill() -> None:
        try:
            for item in items:
                if stop.is_set():
                    return
                queue.put(("item", item))
            queue.put(("end", None))
        except BaseException as error:
            queue.put(("error", error))

    thread = threading.Thread(target=fill, name="decode", daemon=True)
    thread.start()
    try:
        while (entry := queue.get())[0] == "item":
            yield entry[1]
        if entry[0] == "error":
            raise entry[1]
    finally:
        stop.set()
        while thread.is_alive():
            if not queue.empty():
                queue.get()
            thread.join(0.01)
