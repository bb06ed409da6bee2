"""Lists in messages: whole where they are short, cut where they are long."""

import pytest

from wan_accel.listing import first_few


@pytest.mark.parametrize(
    ("items", "separator", "listed"),
    [
        ([], ", ", ""),
        (["a", "b"], ", ", "a, b"),
        (["a", "b", "c", "d"], ", ", "a, b and 2 more"),
        (["a", "b", "c"], "; ", "a; b; and 1 more"),
        (["a", "b", "c"], "\n  ", "a\n  b\n  and 1 more"),
    ],
)
def test_first_few(items: list[str], separator: str, listed: str) -> None:
    assert first_few(items, 2, separator=separator) == listed
