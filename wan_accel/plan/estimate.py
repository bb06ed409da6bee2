"""What a run needs on a layout: by formula and traced activations for every engine, or simulated for FSDP2 and HSDP."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from wan_accel.assemble import Techniques
from wan_accel.draws import Bucket
from wan_accel.plan.ask import Ask, optimizer_of, planned_units
from wan_accel.plan.collectives import Traffic
from wan_accel.plan.disk import Disk, disk_of
from wan_accel.plan.encoders import encoder_bytes, encoding_bytes
from wan_accel.plan.formula import Fixed, Load, Peak, StepMemory, fixed_bytes, peak_of
from wan_accel.plan.gpus import Gpu
from wan_accel.plan.layout import Layout
from wan_accel.plan.simulate import Simulated, Task, simulate
from wan_accel.plan.step_time import RankStep, StepTime, predict
from wan_accel.plan.trace import MicroStep, trace
from wan_accel.plan.traffic import micro_step_traffic
from wan_accel.plan.weights import Unit, Weight, total

Method = Literal["simulated", "formula"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """Bytes of rank 0, collectives of a micro step, sizes on the disk, and predicted times of an optimizer step."""

    ask: Ask
    method: Method
    fixed: Fixed
    peak: Peak
    traffic: tuple[Traffic, ...]
    disk: Disk
    times: tuple[StepTime, ...]


class Planner:
    """Estimates layouts of one recipe and model; what they share is found once.

    Args:
        ask: the first one.
        gpus: to predict times for.
    """

    def __init__(self, ask: Ask, gpus: Sequence[Gpu]) -> None:
        self._ask = ask
        self._gpus = gpus
        self._traces: dict[object, StepMemory] = {}

    @cached_property
    def units(self) -> tuple[Unit, ...]:
        """The parameters of one expert."""
        return planned_units(self._ask)

    @cached_property
    def _encoders(self) -> tuple[int, int]:
        """Bytes of the encoders' weights on a rank, and of encoding the largest micro-batch."""
        ask, kinds = self._ask, self._ask.recipe.data.on_the_fly
        weights = encoder_bytes(kinds, ask.variant, ask.checkpoint, ask.layout.world_size)
        batches = ask.batches
        return weights, encoding_bytes(kinds, ask.variant, ask.checkpoint, batches.bucket, batches.num_samples)

    def estimate(self, ask: Ask) -> Estimate:
        """Simulated where that can be, otherwise by formula."""
        return self.by_simulation(ask) if ask.layout.can_be_simulated else self.by_formula(ask)

    def by_formula(self, ask: Ask) -> Estimate:
        """Within seconds; a minute where blocks are compiled."""
        peak = peak_of(self.units, ask.layout, ask.how, self.step_memory(ask), self._load(ask))
        return self._estimate(ask, "formula", fixed_bytes(self.units, ask.layout, ask.how), peak, self._traffic(ask))

    def by_simulation(self, ask: Ask) -> Estimate:
        """The micro step of rank 0, run on fake tensors; of a pair the other expert is added by formula."""
        found, load = simulate(_task(ask)), self._load(ask)
        one = {name: found.fixed[name] for name in ("parameters", "gradients", "optimizer", "ema")}
        by_formula = fixed_bytes(self.units, ask.layout, ask.how)
        fixed = Fixed(**{name: ask.how.num_experts * size for name, size in one.items()}, host=by_formula.host)
        peak = _peak(found, fixed, load, ask.how.num_experts)
        return self._estimate(ask, "simulated", fixed, peak, found.collectives)

    def step_memory(self, ask: Ask) -> StepMemory:
        """What a micro step adds; once for all layouts that run it alike.

        Blocks of higher Ulysses degrees keep and work with as much as those of degree 2, divided. What lies around them
        is partly of all tokens, but the same whatever blocks recompute and whether they are compiled.
        """
        degree = ask.layout.ulysses
        if degree <= 2:
            return self._traced(ask, degree)
        two = self._traced(ask, 2)
        without = replace(ask.techniques, compile=False, fp8=False, activation_checkpointing="none")
        plain = self._traced(ask, degree, without)
        working = max(2 * two.working / degree, plain.working)
        return StepMemory(layer=2 * two.layer / degree, around=plain.around, working=working)

    def _traced(self, ask: Ask, degree: int, techniques: Techniques | None = None) -> StepMemory:
        layout, techniques = replace(ask.layout, ulysses=degree), techniques or ask.techniques
        is_cast = layout.engine in ("single", "ddp")
        batch: tuple[Bucket, int] = (ask.batches.bucket, ask.batches.num_samples)
        key = (techniques, degree, is_cast, layout.is_mixed, batch)
        if key not in self._traces:
            step = MicroStep(
                variant=ask.variant, shapes=ask.shapes, techniques=techniques, bucket=batch[0], num_samples=batch[1],
                weighting=ask.weighting,
            )  # fmt: skip
            self._traces[key] = trace(step, layout)
        return self._traces[key]

    def _load(self, ask: Ask) -> Load:
        encoders, encoding = self._encoders
        return Load(
            num_layers=ask.size.num_layers, accumulates=ask.accumulates, encoders=encoders, encoding=encoding
        )

    def _traffic(self, ask: Ask) -> tuple[Traffic, ...]:
        return tuple(
            micro_step_traffic(
                self.units, ask.layout, ask.size, num_samples=ask.batches.num_samples, num_tokens=ask.num_tokens,
                policy=ask.techniques.activation_checkpointing,
            )
        )  # fmt: skip

    def _estimate(
        self, ask: Ask, method: Method, fixed: Fixed, peak: Peak, traffic: tuple[Traffic, ...]
    ) -> Estimate:
        step = self._rank_step(ask, traffic, fixed)
        disk = disk_of(
            self.units, ask.layout, ask.how, variant=ask.variant, clips=ask.clips,
            known_variants=ask.recipe.cache.known_variants, kept=ask.checkpoints_kept, is_async=ask.is_async_save,
        )  # fmt: skip
        times = tuple(predict(step, ask.layout, gpu) for gpu in self._gpus)
        return Estimate(ask=ask, method=method, fixed=fixed, peak=peak, traffic=traffic, disk=disk, times=times)

    def _rank_step(self, ask: Ask, traffic: Sequence[Traffic], fixed: Fixed) -> RankStep:
        flops, recomputed = ask.flops()
        steps = ask.batches.num_micro_steps
        weights = [weight for unit in self.units for weight in unit.weights]
        return RankStep(
            flops=flops,
            recomputed=recomputed,
            traffic=[replace(one, bytes=one.bytes * (1 if _is_once(one, ask) else steps)) for one in traffic],
            trained=sum(weight.shard(ask.layout.num_shards) for weight in weights if weight.is_trained),
            parameters=_moved_bytes(weights, ask.layout),
            num_micro_steps=steps,
            is_compiled=ask.techniques.compile,
            fp8=ask.techniques.fp8,
        )


def _moved_bytes(weights: Sequence[Weight], layout: Layout) -> int:
    """A rank's parameters as they lie in host memory: FSDP2's as they are stored, ZeRO-3's in bf16."""
    if layout.is_sharded:
        return sum(weight.itemsize * weight.shard(layout.num_shards) for weight in weights)
    return 2 * -(-total(weights) // layout.num_shards)


def _is_once(traffic: Traffic, ask: Ask) -> bool:
    """DDP reduces in the last micro-step only, ZeRO-2 gathers what was stepped after it."""
    once = {"ddp": "all-reduce", "zero2": "all-gather"}
    return traffic.axis != "ulysses" and traffic.kind == once.get(ask.layout.engine)


def _task(ask: Ask) -> Task:
    return Task(
        variant=ask.variant,
        shapes=ask.shapes,
        techniques=ask.techniques,
        layout=ask.layout,
        bucket=ask.batches.bucket,
        num_samples=ask.batches.num_samples,
        optim=ask.how.optim,
        optimizer=optimizer_of(ask.recipe),
        accumulates=ask.accumulates,
        has_ema=ask.how.ema == "accelerator",
        weighting=ask.weighting,
    )


def _peak(found: Simulated, fixed: Fixed, load: Load, num_experts: int) -> Peak:
    """The largest of the moments that were simulated, and of encoding videos."""
    others = (num_experts - 1) / num_experts
    at_peak = found.peak

    def of_others(name: str) -> float:
        return others * getattr(fixed, name)

    step = Peak(
        moment="forward and backward",
        parameters=at_peak.get("parameters", 0) + of_others("parameters"),
        gradients=at_peak.get("gradients", 0) + of_others("gradients"),
        optimizer=at_peak.get("optimizer", 0) + of_others("optimizer"),
        ema=at_peak.get("ema", 0) + of_others("ema"),
        encoders=load.encoders,
        buffers=at_peak.get("gathered", 0) + at_peak.get("reduced", 0),
        activations=min(found.kept, at_peak.get("other", 0)),
        temporaries=max(at_peak.get("other", 0) - found.kept, 0),
    )
    whole = Peak(
        moment="optimizer step", parameters=fixed.parameters, gradients=fixed.gradients, optimizer=fixed.optimizer,
        ema=fixed.ema, encoders=load.encoders, temporaries=found.optimizer_temporaries,
    )  # fmt: skip
    gradients = fixed.gradients if load.accumulates else 0
    encoding = replace(whole, moment="encoding videos", gradients=gradients, temporaries=load.encoding)
    return max(step, whole, encoding, key=lambda one: one.total)
