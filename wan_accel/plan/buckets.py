"""Which micro-batches a run has, and which of them takes the most memory."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from wan_accel.draws import BatchSize, Bucket, TokenBudget, num_samples
from wan_accel.models.variants import Variant
from wan_accel.recipe.schema import Batch, Data


@dataclass(frozen=True, kw_only=True, slots=True)
class Batches:
    """The largest micro-batch of a run, and how many a data rank has in an optimizer step of its bucket.

    num_samples: of the micro-batch. step_samples: of the optimizer step, over all ranks. clips: of each bucket.
    """

    bucket: Bucket
    num_samples: int
    num_micro_steps: int
    step_samples: int
    clips: Mapping[Bucket, int]

    @property
    def has_mixed_steps(self) -> bool:
        """What is left of several buckets at the end of an epoch makes steps of several micro-batches."""
        return len(self.clips) > 1


def parse_shape(text: str) -> Bucket:
    """`81,480,832` to a bucket.

    Raises:
        ValueError: it is none.
    """
    try:
        frames, height, width = (int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--shape {text}: give FRAMES,HEIGHT,WIDTH in pixels, e.g. 81,480,832") from None
    return Bucket(frames, height, width)


def find_clips(data: Data, variant: Variant, shapes: Sequence[Bucket], num_clips: int) -> dict[Bucket, int]:
    """Clips of each bucket: of the shapes that are given, otherwise of the recipe's latents.

    Args:
        data: of the recipe.
        variant: of the recipe.
        shapes: `--shape`.
        num_clips: of each of these.

    Raises:
        ValueError: a shape that the variant cannot have, or there are no latents yet.
    """
    for shape in shapes:
        _check_shape(shape, variant)
    if shapes:
        return dict.fromkeys(shapes, num_clips)
    folders = [part.path for part in data.datasets] or [str(data.latents)]
    missing = [folder for folder in folders if not Path(folder).is_dir()]
    if missing:
        raise ValueError(
            f"data.latents={missing[0]} is not there, so that nothing says which shapes clips have: give --shape "
            f"FRAMES,HEIGHT,WIDTH, e.g. --shape {variant.num_frames},480,832, once for each"
        )
    from wan_accel.data.latents import LatentsDataset

    counts: Counter[Bucket] = Counter()
    for folder in folders:
        counts.update(LatentsDataset(Path(folder), where=data.where).index().buckets)
    return dict(counts)


def _check_shape(shape: Bucket, variant: Variant) -> None:
    stride, divisor = variant.vae.stride[0], variant.size_divisor
    if shape.num_frames < 1 or (shape.num_frames - 1) % stride:
        raise ValueError(f"--shape: {shape.num_frames} frames; {variant.name} takes {stride}n+1, e.g. 81")
    height, width = shape.height, shape.width
    if min(height, width) < 1 or height % divisor or width % divisor:
        raise ValueError(f"--shape: {height}x{width} pixels; {variant.name} needs multiples of {divisor}")


def largest_batches(data: Data, variant: Variant, clips: Mapping[Bucket, int], num_data_ranks: int) -> Batches:
    """The micro-batch of the most tokens."""
    whole, micro = _batch_size(data.global_batch, variant), _batch_size(data.micro_batch, variant)

    def batches(bucket: Bucket) -> Batches:
        of_step = num_samples(whole, bucket)
        of_rank = -(-of_step // num_data_ranks)
        at_once = min(num_samples(micro, bucket), of_rank)
        return Batches(
            bucket=bucket, num_samples=at_once, num_micro_steps=-(-of_rank // at_once), step_samples=of_step,
            clips=clips,
        )  # fmt: skip

    return max(map(batches, clips), key=lambda one: one.num_samples * variant.num_tokens(*one.bucket))


def _batch_size(batch: Batch, variant: Variant) -> BatchSize:
    if batch.tokens is None:
        return batch.samples or 1
    return TokenBudget(tokens=batch.tokens, multiple_of=batch.multiple_of, num_tokens=variant.num_tokens)
