"""How long an optimizer step takes on a GPU of the table, predicted from data sheets and measured shares. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

from wan_accel.flops import StepFlops
from wan_accel.plan.collectives import Traffic
from wan_accel.plan.gpus import Gpu
from wan_accel.plan.layout import Layout

# AdamW reads gradient, weight and moments and writes the last three: 7 x 4 bytes.
BYTES_A_STEP = 28
_AXES_IN_NODE = {"ulysses"}


@dataclass(frozen=True, kw_only=True, slots=True)
class RankStep:
    """A rank's optimizer step. flops: of the model, what MFU counts. recomputed: on top. trained: elements it steps.

    traffic: of all micro-steps. parameters: bytes a rank, for what offloading moves.
    """

    flops: StepFlops
    recomputed: StepFlops
    traffic: Sequence[Traffic]
    trained: int
    parameters: int
    num_micro_steps: int
    is_compiled: bool
    fp8: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTime:
    """Seconds of an optimizer step. sharding: its collectives, which run beside computing. exchanges: Ulysses'."""

    gpu: str
    compute: float
    sharding: float
    exchanges: float
    optimizer: float
    mfu: float

    @property
    def seconds(self) -> float:
        return max(self.compute, self.sharding) + self.exchanges + self.optimizer


def predict(step: RankStep, layout: Layout, gpu: Gpu) -> StepTime:
    """Computing and sharding's collectives overlap; exchanges and the optimizer stand in a row with them."""
    compute = _compute_seconds(step, gpu)
    sharding = sum(_seconds(one, layout, gpu) for one in step.traffic if one.axis not in _AXES_IN_NODE)
    exchanges = sum(_seconds(one, layout, gpu) for one in step.traffic if one.axis in _AXES_IN_NODE)
    optimizer = _optimizer_seconds(step, layout, gpu)
    total = max(compute, sharding) + exchanges + optimizer
    return StepTime(
        gpu=gpu.name, compute=compute, sharding=sharding, exchanges=exchanges, optimizer=optimizer,
        mfu=step.flops.total / total / (1e12 * gpu.tflops),
    )  # fmt: skip


def _compute_seconds(step: RankStep, gpu: Gpu) -> float:
    products = (step.flops.products + step.recomputed.products) / (gpu.products * (gpu.fp8 if step.fp8 else 1))
    attention = (step.flops.attention + step.recomputed.attention) / gpu.attention
    return (products + attention) / (1e12 * gpu.tflops) * (1 if step.is_compiled else gpu.eager)


def _seconds(traffic: Traffic, layout: Layout, gpu: Gpu) -> float:
    """Of n ranks each sends (n - 1) / n of the tensor, in an all-reduce twice that."""
    n = traffic.num_ranks
    sent = traffic.bytes * (n - 1) / n * (2 if traffic.kind == "all-reduce" else 1)
    # Replicas are ranks far apart; other groups are neighbours.
    span = layout.world_size if traffic.axis == "dp_replicate" else n
    bandwidth = gpu.node_gb_s if span <= gpu.gpus_per_node else gpu.network_gb_s
    return sent / (gpu.link_share * bandwidth * 1e9)


def _optimizer_seconds(step: RankStep, layout: Layout, gpu: Gpu) -> float:
    if layout.offload == "none":
        return BYTES_A_STEP * step.trained / (gpu.hbm_gb_s * 1e9)
    moved = _moved_bytes(step, layout)
    return moved / (gpu.pcie_gb_s * 1e9) + BYTES_A_STEP * step.trained / (gpu.host_gb_s * 1e9)


def _moved_bytes(step: RankStep, layout: Layout) -> int:
    """What an offloaded rank's step takes over the bus, one way after the other."""
    steps = step.num_micro_steps
    if layout.is_sharded:  # fp32 gradients go down in each micro-step, parameters come up for each gathering
        passes = 2 if layout.reshard_after_forward else 1
        return steps * (4 * step.trained + passes * step.parameters)
    moved = 4 * step.trained  # gradients go down and weights come up, in bf16
    if layout.engine == "zero2":  # gradients go down in fp32; those of several micro-steps wait below, in bf16
        moved = 6 * step.trained + (2 * (2 * steps - 1) * step.trained if steps > 1 else 0)
    if layout.offload == "parameters":
        moved += 2 * step.parameters * steps  # for forward and for backward
    return moved
