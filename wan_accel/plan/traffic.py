"""Collectives of a micro step by formula: what `CountCollectives` counts of a simulated one. Pure."""

from collections.abc import Sequence

from wan_accel.models.variants import DitSize
from wan_accel.plan.collectives import Traffic
from wan_accel.plan.formula import BF16, FP32, gathered_size, reduced_size
from wan_accel.plan.layout import Layout
from wan_accel.plan.weights import Unit, total


def micro_step_traffic(
    units: Sequence[Unit], layout: Layout, size: DitSize, *, num_samples: int, num_tokens: int, policy: str | float
) -> list[Traffic]:
    """Collectives of one rank's forward and backward.

    Micro-steps of an optimizer step share DDP's one reduction, and ZeRO-2's gathering of what was stepped.

    Args:
        units: of the expert that runs.
        layout: the layout.
        size: of the model.
        num_samples: of the micro-batch.
        num_tokens: of a sample, whole.
        policy: of recomputation; `full` runs exchanges again.
    """
    engines = {"fsdp2": _fsdp, "hsdp": _fsdp, "zero2": _zero2, "zero3": _zero, "ddp": _ddp}
    found = engines[layout.engine](units, layout) if layout.engine in engines else []
    if layout.ulysses > 1:
        found += _ulysses(layout, size, num_samples, num_tokens, policy)
    return [one for one in found if one.bytes]


def _fsdp(units: Sequence[Unit], layout: Layout) -> list[Traffic]:
    """Every unit is gathered forward and backward, and reduced where it is trained; replicas reduce the shards."""
    passes, shards = 2 if layout.reshard_after_forward else 1, layout.num_shards
    trained = [unit for unit in units if unit.trained()]
    reduced = sum(reduced_size(unit, layout) for unit in trained)
    found = [
        Traffic(
            kind="all-gather", axis="dp_shard", num_ranks=shards, calls=passes * len(units),
            bytes=passes * sum(gathered_size(unit, layout) for unit in units),
        ),
        Traffic(kind="reduce-scatter", axis="dp_shard", num_ranks=shards, calls=len(trained), bytes=reduced),
    ]  # fmt: skip
    if layout.dp_replicate > 1:
        found.append(
            Traffic(
                kind="all-reduce", axis="dp_replicate", num_ranks=layout.dp_replicate, calls=len(trained),
                bytes=reduced // shards,
            )
        )  # fmt: skip
    return found


def _zero(units: Sequence[Unit], layout: Layout) -> list[Traffic]:
    weights = [weight for unit in units for weight in unit.weights]
    itemsize, ranks = BF16 if layout.is_mixed else FP32, layout.world_size
    gathered, reduced = 2 * itemsize * total(weights), itemsize * total(weights, trained=True)
    return [
        Traffic(kind="all-gather", axis="dp_shard", num_ranks=ranks, calls=None, bytes=gathered),
        Traffic(kind="reduce-scatter", axis="dp_shard", num_ranks=ranks, calls=None, bytes=reduced),
    ]


def _zero2(units: Sequence[Unit], layout: Layout) -> list[Traffic]:
    """DeepSpeed reduces gradients to all ranks, of which each keeps its part (`use_multi_rank_bucket_allreduce`)."""
    itemsize, ranks = BF16 if layout.is_mixed else FP32, layout.world_size
    size = itemsize * total((weight for unit in units for weight in unit.weights), trained=True)
    return [
        Traffic(kind="all-reduce", axis="dp_shard", num_ranks=ranks, calls=None, bytes=size),
        Traffic(kind="all-gather", axis="dp_shard", num_ranks=ranks, calls=None, bytes=size),
    ]


def _ddp(units: Sequence[Unit], layout: Layout) -> list[Traffic]:
    size = sum(weight.itemsize * weight.numel for unit in units for weight in unit.trained())
    return [Traffic(kind="all-reduce", axis="dp_replicate", num_ranks=layout.world_size, calls=None, bytes=size)]


def _ulysses(
    layout: Layout, size: DitSize, num_samples: int, num_tokens: int, policy: str | float
) -> list[Traffic]:
    """A block exchanges q, k and v together and attention's output, forward and backward; the output is gathered."""
    itemsize, ranks = BF16 if layout.is_mixed else FP32, layout.ulysses
    tokens = num_samples * -(-num_tokens // ranks)
    passes = 3 if policy == "full" else 2
    patch = size.patch_size[0] * size.patch_size[1] * size.patch_size[2]
    gathered = itemsize * ranks * tokens * size.out_dim * patch
    return [
        Traffic(
            kind="all-to-all", axis="ulysses", num_ranks=ranks, calls=2 * passes * size.num_layers,
            bytes=passes * size.num_layers * 4 * itemsize * tokens * size.dim,
        ),
        Traffic(kind="all-gather", axis="ulysses", num_ranks=ranks, calls=1, bytes=gathered),
        Traffic(kind="reduce-scatter", axis="ulysses", num_ranks=ranks, calls=1, bytes=gathered),
    ]  # fmt: skip
