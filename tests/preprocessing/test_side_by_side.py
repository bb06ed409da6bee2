"""Batches side by side: in order, ahead of the caller but not far, with half the threads each."""

import threading
import time

import pytest

from preprocessing.side_by_side import SideBySide, num_cores


def test_two_batches_share_the_threads():
    assert [SideBySide(num).threads_each for num in (1, 2, 5, 8)] == [1, 1, 2, 4]
    assert SideBySide(0).threads_each == max(1, num_cores() // 2)


def test_results_come_in_order_although_later_items_are_faster():
    def work(number: int) -> int:
        time.sleep(0.05 if number == 0 else 0.0)
        return number * number

    assert list(SideBySide(2)(work, range(6))) == [0, 1, 4, 9, 16, 25]


def test_two_run_at_once():
    both = threading.Barrier(2, timeout=10)
    assert list(SideBySide(2)(lambda _: both.wait() >= 0, range(4))) == [True] * 4


def test_items_are_taken_no_further_ahead_than_three():
    taken = []

    def items():
        for number in range(8):
            taken.append(number)
            yield number

    results = SideBySide(2)(lambda number: number, items())
    assert next(results) == 0
    assert taken == [0, 1, 2]


def test_an_error_of_the_items_comes_after_the_results_before_it():
    def items():
        yield from range(2)
        raise OSError("unplugged")

    results = SideBySide(2)(lambda number: number, items())
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(OSError, match="unplugged"):
        next(results)


def test_an_error_comes_after_the_results_before_it():
    results = SideBySide(2)(lambda number: 6 // number, [3, 2, 0, 1])
    assert [next(results), next(results)] == [2, 3]
    with pytest.raises(ZeroDivisionError):
        next(results)
