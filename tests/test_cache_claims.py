"""Work shared out by files: each item once, with few looks at the folder, and a clear end where it is taken away."""

import multiprocessing
import shutil
from pathlib import Path

import pytest

from wan_accel.cache_claims import Claims
from wan_accel.data.store import StoreError

TOTAL = 3000


def take(folder: Path, total: int = TOTAL) -> list[int]:
    return list(Claims(folder, "clips", total))


def test_processes_take_every_item_once(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        taken = pool.map(take, [tmp_path] * 4, chunksize=1)
    assert sorted(number for mine in taken for number in mine) == list(range(TOTAL))
    assert take(tmp_path) == []


def test_looks_do_not_grow_with_the_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes in turn: one comes back after the other took 1, 10 or 1000 items."""
    looks, exists = [0], Path.exists

    def counted(path: Path) -> bool:
        looks[0] += 1
        return exists(path)

    monkeypatch.setattr(Path, "exists", counted)
    slow, fast = (iter(Claims(tmp_path, "clips", 1_000_000)) for _ in range(2))
    for others, allowed in ((0, 1), (1, 4), (10, 9), (1000, 21)):
        before = [next(fast) for _ in range(others)]
        looks[0] = 0
        number = next(slow)
        assert looks[0] <= allowed
        assert not before or number == before[-1] + 1
    looks[0] = 0
    assert [next(fast) for _ in range(100)] == list(range(number + 1, number + 101))
    assert looks[0] <= 103  # nobody came between: one look each


def test_kinds_do_not_mix_and_a_list_can_be_empty(tmp_path: Path) -> None:
    assert take(tmp_path, 2) == [0, 1]
    assert list(Claims(tmp_path, "parts", 2)) == [0, 1]
    assert take(tmp_path, 0) == []


def test_folder_that_is_taken_away(tmp_path: Path) -> None:
    claims = iter(Claims(tmp_path / "claims", "clips", 3))
    (tmp_path / "claims").mkdir()
    assert next(claims) == 0
    shutil.rmtree(tmp_path / "claims")
    with pytest.raises(StoreError, match=r"claims is gone: another run removed it, .*what is encoded is kept"):
        next(claims)
