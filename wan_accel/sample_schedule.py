"""Which noise levels and which clips videos are drawn from during training. Pure, torch-free."""

from collections import Counter
from collections.abc import Hashable, Sequence

from wan_accel.models.variants import Expert
from wan_accel.objective import shift_sigma


def euler_sigmas(num_steps: int, shift: float) -> list[float]:
    """Noise levels of an Euler sampler, from 1 to 0: `num_steps` + 1 evenly spaced ones, shifted as Wan samples."""
    return [min(shift_sigma(1 - step / num_steps, shift), 1.0) for step in range(num_steps)] + [0.0]


def drawn_sigmas(num_steps: int, shift: float, experts: Sequence[Expert]) -> list[float]:
    """The part of `euler_sigmas` that the trained experts cover, then 0.

    With every expert of a variant that is all of it. The high-noise expert alone stops at the boundary, and its last
    step goes straight to 0: x - sigma * velocity is what it predicts x_0 to be. The low-noise expert alone starts
    below the boundary, from the noised ground truth.

    Raises:
        ValueError: no step falls into the experts' range.
    """
    covered = [sigma for sigma in euler_sigmas(num_steps, shift)[:-1] if any(e.covers(sigma) for e in experts)]
    if not covered:
        names = " and ".join(expert.name for expert in experts)
        raise ValueError(
            f"validation.sample.num_steps={num_steps} has no step for the {names} expert at shift {shift:g}: use more"
        )
    return [*covered, 0.0]


def choose_rows(rows: Sequence[int], group_ids: Sequence[Hashable], num_clips: int) -> list[int]:
    """The first `num_clips` rows, taking one of every source before a second one of any.

    Raises:
        ValueError: there are fewer rows.
    """
    if num_clips > len(rows):
        raise ValueError(
            f"validation.sample.num_clips={num_clips} but validation has {len(rows)} clips: use at most that many, or "
            "raise data.eval.fraction"
        )
    seen: Counter[Hashable] = Counter()
    turns = []
    for row in sorted(rows):
        turns.append((seen[group_ids[row]], row))
        seen[group_ids[row]] += 1
    return [row for _, row in sorted(turns)[:num_clips]]
