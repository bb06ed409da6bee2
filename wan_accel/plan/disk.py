"""Bytes that a run leaves on the disk, and in host memory while it writes a checkpoint. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from wan_accel.draws import Bucket
from wan_accel.models.conditioning.estimate import BYTES_STORED, bytes_by_column
from wan_accel.models.variants import TEXT_LENGTH, Variant
from wan_accel.optimizers import state_bytes
from wan_accel.parallel.names import is_zero
from wan_accel.plan.formula import BF16, FP32, Trained, optimizer_bytes
from wan_accel.plan.layout import Layout
from wan_accel.plan.weights import Unit, total

_KINDS = ("video", "pose", "reference", "face", "known", "image")


@dataclass(frozen=True, kw_only=True, slots=True)
class Disk:
    """checkpoint: one of them. kept: how many stay (`save_total_limit`), None for all. cache: of the clips that are
    known, captions at their longest. staged: host memory of a rank while a checkpoint is written beside training.
    """

    checkpoint: int
    kept: int | None
    cache: int
    staged: int


def disk_of(
    units: Sequence[Unit],
    layout: Layout,
    how: Trained,
    *,
    variant: Variant,
    clips: Mapping[Bucket, int],
    known_variants: int,
    kept: int | None,
    is_async: bool,
) -> Disk:
    """Sizes of a run's checkpoints and latents folder."""
    weights = [weight for unit in units for weight in unit.trained()]
    ema = FP32 * total(weights) if how.ema else 0
    beside = (BF16 if layout.is_mixed else FP32) * total(weights) if layout.engine == "zero2" else 0  # of the forward
    one = beside + FP32 * total(weights) + sum(state_bytes(how.optim, weight.shape) for weight in weights) + ema
    return Disk(
        checkpoint=how.num_experts * one,
        kept=kept,
        cache=sum(count * clip_bytes(variant, bucket, known_variants) for bucket, count in clips.items()),
        staged=_staged(units, layout, how) if is_async else 0,
    )


def clip_bytes(variant: Variant, bucket: Bucket, known_variants: int) -> int:
    """A clip of a latents folder, with a caption of its own of the full length."""
    columns = bytes_by_column(variant, bucket, kinds=_KINDS, known_variants=known_variants)
    return sum(columns.values()) + TEXT_LENGTH * variant.dit.text_dim * BYTES_STORED


def _staged(units: Sequence[Unit], layout: Layout, how: Trained) -> int:
    """The rank's own shards, or on rank 0 everything; DeepSpeed writes its own checkpoints without a copy."""
    if is_zero(layout.engine):
        return 0
    trained = sum(weight.shard(layout.num_shards) for unit in units for weight in unit.trained())
    ema = FP32 * trained if how.ema else 0
    return how.num_experts * (FP32 * trained + ema + optimizer_bytes(units, layout, how))
