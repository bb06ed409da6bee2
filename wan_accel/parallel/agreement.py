"""What all ranks must see alike: one rank decides where that can be, and otherwise all compare a few bytes."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch.distributed as dist

from wan_accel.data.digest import RowsDigest

T = TypeVar("T")
_FAILURE = "wan_accel/failure"


def from_main_rank(make: Callable[[], T]) -> T:
    """What rank 0 makes, on every rank. Collective over all ranks; the others make nothing.

    Raises:
        ValueError, OSError: what rank 0 raised, on every rank.
    """
    if not dist.is_initialized():
        return make()
    outcome: list[tuple[T | None, ValueError | OSError | None]] = [(None, None)]
    if dist.get_rank() == 0:
        try:
            outcome = [(make(), None)]
        except (ValueError, OSError) as error:
            outcome = [(None, error)]
    dist.broadcast_object_list(outcome, src=0)
    made, problem = outcome[0]
    if problem is not None:
        raise problem
    return made  # type: ignore[return-value]


def check_same_rows(mine: RowsDigest, name: str) -> None:
    """Check that every rank has the same rows. Collective over all ranks, 100 bytes of each.

    Args:
        mine: the digest of this rank's.
        name: what holds the rows, for the error.

    Raises:
        ValueError: on every rank: which ranks have which number of rows, and what to do.
    """
    if not dist.is_initialized():
        return
    found: list[RowsDigest] = [mine] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    if len(set(found)) > 1:
        ranks = {one: [rank for rank, its in enumerate(found) if its == one] for one in found}
        described = "; ".join(f"{one.rows} on {name_ranks(which)}" for one, which in ranks.items())
        raise ValueError(
            f"{name} does not have the same rows on all ranks ({described}; equal numbers may be other clips or "
            "captions): give every machine the same folder, or equal copies, and start again"
        )


def name_ranks(ranks: Sequence[int]) -> str:
    """Sorted ranks in words: ranks 0-3, 7."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    words = ", ".join(f"{first}-{last}" if last > first else str(first) for first, last in runs)
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {words}"


def announce_failure(problem: str) -> None:
    """Leave word of why this rank ends alone: the others will find a collective broken off, which says nothing."""
    if dist.is_initialized():
        _store().set(_FAILURE, problem)


def announced_failure() -> str | None:
    """Why a rank has ended alone; None where none has, or where the store has gone with it."""
    if not dist.is_initialized():
        return None
    try:
        return _store().get(_FAILURE).decode() if _store().check([_FAILURE]) else None
    except RuntimeError:  # torch's DistError; without a launcher rank 0 holds the store
        return None


def _store() -> dist.Store:
    # torch (2.8 to 2.14) has no public way to the store that its process group met at.
    return dist.distributed_c10d._get_default_store()
