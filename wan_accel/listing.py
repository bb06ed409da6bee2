"""Lists in messages, cut short. Torch-free."""

from collections.abc import Sequence


def first_few(items: Sequence[str], most: int, *, separator: str = ", ") -> str:
    """The first `most` items, and how many more there are: `a, b and 3 more`; `a; b; and 3 more`."""
    shown = separator.join(items[:most])
    if len(items) <= most:
        return shown
    return f"{shown}{' ' if separator == ', ' else separator}and {len(items) - most} more"
