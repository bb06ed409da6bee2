"""Validation: which rows are held out, and their fixed draws. Pure, torch-free."""

from collections.abc import Hashable, Sequence

import numpy as np

from wan_accel.draws import NO_KNOWN, DatasetIndex, SampleDraw
from wan_accel.models.variants import Expert
from wan_accel.streams import Stream, hash_items, mix


def split_groups(group_ids: Sequence[Hashable], *, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Split rows into training and validation rows without tearing a group (the clips of one source) apart.

    Groups go to validation in an order fixed by (seed, group id) until they hold at least `fraction` of the
    rows; adding rows to a dataset therefore moves few groups. A fraction of 0 gives no validation rows.
    """
    groups: dict[str, list[int]] = {}
    for row, group in enumerate(group_ids):
        groups.setdefault(str(group), []).append(row)
    keys = {name: np.frombuffer(name.encode().ljust(8, b"\0"), dtype=np.uint8) for name in groups}
    order = sorted(groups, key=lambda name: (int(_fold(seed, keys[name])), name))
    evaluation: list[int] = []
    for name in order:
        if len(evaluation) >= fraction * len(group_ids):
            break
        evaluation += groups[name]
    held = set(evaluation)
    return [row for row in range(len(group_ids)) if row not in held], sorted(evaluation)


def _fold(seed: int, data: np.ndarray) -> np.uint64:
    """Hash bytes."""
    key = hash_items(seed, Stream.SPLIT, 0, np.asarray(len(data)))
    for byte in data.tolist():
        key = mix(key ^ np.uint64(byte))
    return key  # type: ignore[return-value]


def fixed_draws(
    index: DatasetIndex, rows: Sequence[int], *, num_sigmas: int, seed: int, expert: Expert | None = None
) -> list[SampleDraw]:
    """Draws for validation: every row at `num_sigmas` evenly spread sigmas, noise fixed, nothing dropped.

    Sigmas are the middles of equal bins of the expert's range, so the mean over them is not dominated by the
    training density.
    """
    low, high = (expert.sigma_min, expert.sigma_max) if expert is not None else (0.0, 1.0)
    draws = []
    for row in rows:
        for level in range(num_sigmas):
            item = np.asarray(row * num_sigmas + level)
            draws.append(
                SampleDraw(
                    index=int(row),
                    epoch=0,
                    sigma=low + (high - low) * (level + 0.5) / num_sigmas,
                    noise_seed=int(hash_items(seed, Stream.FIXED, 0, item) >> np.uint64(1)),
                    known=0 if index.num_known[row] else NO_KNOWN,
                )
            )
    return draws
