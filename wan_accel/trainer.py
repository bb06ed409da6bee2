"""WanTrainer: transformers' Trainer, driven by the step plan.

Trainer methods that are overridden, checked against transformers 5.17 to 5.23 (tests/test_trainer_overrides.py):

| method | why |
|---|---|
| train | the watchdog |
| get_train_dataloader | the step plan decides the samples; one item is an optimizer step of this data rank |
| _prepare_for_training | FSDP2 models are sharded already; weights are loaded after preparation, for every engine |
| create_optimizer | the experts of a pair have parameter groups of their own |
| training_step | runs the micro-batches of a step; loss = sum over samples / global sample count |
| _clip_grad_norm, _get_grad_norm | each expert by its own norm over sharded parameters; a norm that is not finite |
| _save_checkpoint, _load_from_checkpoint | our checkpoints (wan_accel.run_checkpoints) |
| evaluate | fixed-noise loss |
| get_batch_samples, log | data wait, tokens per second, TFLOP/s, MFU, peak memory; a sample that cannot be read |
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback
from transformers.training_args import OptimizerNames

from wan_accel import checkpoint
from wan_accel.arguments import WanTrainingArguments
from wan_accel.checkpoint_writer import CheckpointWriter
from wan_accel.data.collate import MicroBatch, SampleSource
from wan_accel.data.digest import RowsDigest
from wan_accel.default_plan import default_plan
from wan_accel.draws import SampleDraw
from wan_accel.ema import Ema, EmaCallback, start_ema
from wan_accel.interval import Interval, StepRecord, joint_norm
from wan_accel.lora import LoraSettings
from wan_accel.metrics import MetricsCallback, peak_gib
from wan_accel.models.denoiser import WanDenoiser
from wan_accel.models.pair import ExpertPair, experts_of, split_by_expert
from wan_accel.models.variants import Variant
from wan_accel.noising import conditions_of, noise_batch
from wan_accel.nonfinite import FiniteGuard
from wan_accel.objective import micro_batch_loss
from wan_accel.optimizer_settings import IntervalsCallback
from wan_accel.optimizers import optimizer_problem
from wan_accel.parallel.agreement import from_main_rank
from wan_accel.parallel.engine import detect_engine, detect_offload
from wan_accel.parallel.mesh import ParallelDims
from wan_accel.parallel.names import is_zero
from wan_accel.parallel.zero import backward_zero, refuse_offload
from wan_accel.preemption import Preemption
from wan_accel.preparation import apply_parallelism, dp_replicate, prepare_pair, prepare_sharded, start_watchdog
from wan_accel.run_checkpoints import resume, save_checkpoint, trained_shapes
from wan_accel.step_loader import check_items, step_loader
from wan_accel.step_plan import StepPlan
from wan_accel.throughput import Throughput
from wan_accel.validation import as_metrics, fixed_losses
from wan_accel.watchdog import Watchdog


class WanTrainer(Trainer):
    """Trains a `WanDenoiser` with accelerate's engines and Ulysses.

    Args:
        model: the denoiser, or pair of them, with everything applied (LoRA, Ulysses). Under FSDP2 it may be
            sharded already; a plain one, equal on all ranks, is sharded here.
        args: arguments; `max_steps` or `num_train_epochs` end the run.
        train_dataset: cached conditions (`LatentsDataset`).
        plan: what each step does; by default over all rows, from `args`.
        variant: the row of the variants table.
        expert: the expert that is trained, `both` for a pair.
        lora: the LoRA's settings, None for full training.
        base: name or path of the base checkpoint, recorded in checkpoints.
        eval_draws: fixed draws for validation; empty for none.
        data: the digest of the rows of `train_dataset`, to tell in a resumed run whether they are the same.
        live: the source of training samples whose conditions are encoded anew, and what encodes them; validation
            uses the cached ones.
        callbacks: further callbacks.

    Raises:
        ValueError: the parallel degrees do not fit the model or the number of processes.
    """

    args: WanTrainingArguments

    def __init__(
        self,
        model: WanDenoiser | ExpertPair,
        args: WanTrainingArguments,
        train_dataset: SampleSource,
        plan: StepPlan | None = None,
        *,
        variant: Variant,
        expert: str = "default",
        lora: LoraSettings | None = None,
        base: str = "",
        eval_draws: Sequence[SampleDraw] = (),
        data: RowsDigest | None = None,
        live: tuple[SampleSource, Callable[[MicroBatch], MicroBatch]] | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        plan = plan or default_plan(train_dataset, args, variant, variant.trained_experts(expert))
        # Trainer's own skipping would read every batch again; the step sampler starts at the right step.
        args.ignore_data_skip = True
        if args.max_steps <= 0:
            args.max_steps = plan.num_steps(args.num_train_epochs)
        self.preemption = Preemption(self)
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=list(eval_draws) or None,
            callbacks=[IntervalsCallback(), MetricsCallback(), EmaCallback(self), *callbacks, self.preemption],
        )
        self.model_accepts_loss_kwargs = False
        self.source = train_dataset
        self.plan = plan
        self.variant = variant
        self.expert = expert
        self.lora = lora
        self.base = base
        self.eval_draws = list(eval_draws)
        self.data = data
        self.live = live
        self.engine = detect_engine(self.accelerator)
        self.dims = ParallelDims(
            world_size=args.world_size, ulysses=args.ulysses, dp_replicate=dp_replicate(self.accelerator)
        )
        self.lanes: dict[str, nn.Module] = dict(experts_of(model, expert))
        for denoiser in experts_of(model, expert).values():
            self.dims.validate(denoiser.num_heads)
            apply_parallelism(self, denoiser)
        self._step_experts: list[str] = []
        self._norms: dict[str, Tensor | float] = {}
        offload = detect_offload(self.accelerator, self.engine)
        problem = optimizer_problem(OptimizerNames(args.optim).value, self.engine, offload)
        if problem is not None:
            raise ValueError(problem)
        if self.engine == "zero3" and args.ema_decay:
            refuse_offload(offload)
        self.ema: Ema | None = None
        self.writer = CheckpointWriter()
        self.guard = FiniteGuard(args, plan, train_dataset, self.dims, self.writer)
        self._step: StepRecord | None = None
        self._watchdog: Watchdog | None = None
        first = next(iter(experts_of(model, expert).values()))
        self.throughput = Throughput(first, lora, ulysses=args.ulysses, device=self.accelerator.device)
        self._logged = Interval()

    def train(self, *args: Any, **kwargs: Any) -> Any:
        with self.watched():
            return super().train(*args, **kwargs)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Watch over the ranks (`wan_accel.watchdog`); within another one, nothing more. Collective."""
        if self._watchdog is not None or not self.args.hang_seconds:
            yield
            return
        self._watchdog = start_watchdog(self)
        error = None
        try:
            yield
        except BaseException as raised:
            error = raised
            raise
        finally:
            self._watchdog.stop(error)
            self._watchdog = None

    def beat(self, doing: str) -> None:
        """Tell the watchdog where this rank is; called on all ranks alike."""
        if self._watchdog is not None:
            self._watchdog.beat(self.state.global_step, doing)

    def get_train_dataloader(self) -> DataLoader:
        """One item an optimizer step; it is not given to accelerate, which would shard it again."""
        return step_loader(self)

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: DataLoader, resume_from_checkpoint: str | None
    ) -> tuple[nn.Module, DataLoader]:
        if self.engine == "fsdp2":
            model = prepare_sharded(self, max_steps)
        elif isinstance(self.model, ExpertPair):
            model = prepare_pair(self, self.model, max_steps)
        else:
            model, train_dataloader = super()._prepare_for_training(max_steps, train_dataloader, None)
            self.lanes = {self.expert: model}
        self.ema = start_ema(self.args, self._unwrapped, engine=self.engine)
        if resume_from_checkpoint is not None:
            resume(self, Path(resume_from_checkpoint), model)
        for name in ("model", "optimizer", "lr_scheduler"):
            setattr(self.callback_handler, name, getattr(self, name))
        self.callback_handler.train_dataloader = train_dataloader
        self._logged = Interval()  # the first log line is of steps, not of getting ready
        return model, train_dataloader

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Trainer's optimizer; the experts of a pair get parameter groups of their own."""
        optimizer = super().create_optimizer(model)
        model = self.module if model is None else model
        if isinstance(model, ExpertPair):
            optimizer.param_groups = split_by_expert(optimizer.param_groups, model)
        return optimizer

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Forward and backward of this rank's share of an optimizer step.

        Returns:
            Scalar; its mean over all ranks is the mean loss over the step's samples.
        """
        model.train()
        self.guard.begin(inputs)
        micro_batches: list[MicroBatch] = inputs["micro_batches"]
        self._step_experts = inputs["experts"]
        last = {expert: index for index, expert in enumerate(self._step_experts)}
        total = torch.zeros((), device=self.accelerator.device)
        sums: dict[str, Tensor] = {}
        for index, (batch, expert) in enumerate(zip(micro_batches, self._step_experts)):
            self.beat(f"forward and backward of micro-batch {index + 1} of {len(micro_batches)}")
            loss = self._micro_step(expert, batch, inputs["num_samples"], is_last=index == last[expert])
            total += loss
            sums[expert] = sums.get(expert, torch.zeros_like(loss)) + loss * inputs["num_samples"]
            self.throughput.add(batch["latents"].shape)
        self._step = StepRecord(loss=total, loss_sums=sums, num_samples=inputs["samples_of"])
        return total

    def _micro_step(self, expert: str, batch: MicroBatch, num_samples: int, *, is_last: bool) -> Tensor:
        """Forward and backward of a micro-batch; `is_last` of this expert's in the optimizer step.

        DDP and ZeRO reduce gradients at the last one; FSDP2 reduces each into its shards, which saves memory.
        """
        lane = self.lanes[expert]
        self.accelerator.gradient_state._set_sync_gradients(is_last)
        with lane.no_sync() if self.engine == "ddp" and not is_last else nullcontext():  # type: ignore[operator]
            loss = self._micro_loss(expert, batch, num_samples)
            if is_zero(self.engine):
                backward_zero(lane, loss, is_last=is_last)
            else:
                self.accelerator.backward(loss)
        return self.guard.logged(loss.detach())

    def _micro_loss(self, expert: str, batch: MicroBatch, num_samples: int) -> Tensor:
        batch = self._on_device(batch)
        predicted, target, mask = self._predict(expert, batch)
        per_sample, loss = micro_batch_loss(
            predicted, target, mask, sigma=batch["sigma"], weight=batch["weight"], weighting=self.args.weighting,
            shift=self.args.shift, num_samples=num_samples, num_data_ranks=self.dims.num_data_ranks,
        )  # fmt: skip
        return self.guard.watch(per_sample, loss)

    def _predict(self, expert: str, batch: MicroBatch) -> tuple[Tensor, Tensor, Tensor | None]:
        """Predicted and true velocity (B, C, F, h, w) fp32 of a micro-batch, and where the loss looks."""
        batch = self._on_device(batch)
        batch = batch if self.live is None else self.live[1](batch)
        noisy = noise_batch(batch, self.variant)
        predicted = self.lanes[expert](noisy.hidden_states, noisy.timestep, **noisy.conditions)
        return predicted, noisy.target, noisy.loss_mask

    def denoise(self, expert: str, noisy: Tensor, sigma: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """The velocity that an expert's live weights predict.

        Args:
            expert: its name.
            noisy: (B, C, F, h, w) fp32 noisy latents, what is known of them in place (`noising.impose_known`).
            sigma: (B,) fp32.
            batch: a micro-batch on the device, for its conditions.
        """
        self.beat("drawing a video")
        return self.lanes[expert](noisy, 1000.0 * sigma, **conditions_of(batch, sigma, self.variant))

    def _on_device(self, batch: MicroBatch) -> MicroBatch:
        """A micro-batch on the GPU; from pinned memory the host does not wait for it."""
        device = self.accelerator.device
        return {name: value.to(device, non_blocking=True) for name, value in batch.items()}

    def _clip_grad_norm(self, model: nn.Module) -> Tensor | float | None:
        """Clip each expert that the step used by its own norm; returns the norm over all of them."""
        self.beat("clipping gradients and stepping the optimizer")
        self._norms = {expert: self._clip_lane(self.lanes[expert]) for expert in sorted(set(self._step_experts))}
        return joint_norm(self._norms)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | float | None = None) -> Tensor | float | None:
        """Trainer calls this before the optimizer's step: a norm that is not finite stops the run or the step here.

        Returns what is logged: the norm over the experts that take the step, the last such norm if none does.
        """
        if grad_norm is None:  # max_grad_norm: 0 clips nothing
            grad_norm = self._clip_grad_norm(model)
        left_out = self.guard.left_out(self._norms)
        for expert in left_out:
            self._leave_out(expert)
        assert self._step is not None
        if left_out:
            self._tr_loss -= self._step.loss
            grad_norm = joint_norm({name: norm for name, norm in self._norms.items() if name not in left_out})
        self._logged.add(self._step, self._norms, left_out)
        if grad_norm is not None:
            self._logged.grad_norm = grad_norm
        return self._logged.grad_norm

    def _leave_out(self, expert: str) -> None:
        """Optimizers leave parameters without a gradient alone: no decay, no moments, no step count.

        A DeepSpeed engine steps at the end of backward, and does the same by itself for a norm that is not finite.

        Raises:
            RuntimeError: this DeepSpeed did not.
        """
        lane: Any = self.lanes[expert]
        if not is_zero(self.engine):
            lane.zero_grad(set_to_none=True)
        elif not lane.optimizer.overflow:
            raise RuntimeError("this DeepSpeed steps with gradients that are not finite: upgrade it (0.19.8 is tested)")
        else:
            # The flag stands until this engine's next step, and Trainer would hold the schedule back as long.
            lane.optimizer.overflow = False

    def stepped_names(self) -> list[str]:
        """Trained parameters that the optimizer has just stepped, before their gradients are cleared."""
        trained = {name: p for name, p in self._unwrapped.named_parameters() if p.requires_grad}
        if not is_zero(self.engine):
            return [name for name, parameter in trained.items() if parameter.grad is not None]
        # Engines have cleared theirs by now.
        stepped = set(self._step_experts) - self.guard.last_left_out
        is_pair = isinstance(self.model, ExpertPair)
        return [name for name in trained if (name.split(".")[0] if is_pair else self.expert) in stepped]

    def _clip_lane(self, lane: nn.Module) -> Tensor | float:
        if is_zero(self.engine):
            return lane.get_global_grad_norm()  # type: ignore[operator]  # the engine has clipped and stepped already
        norm = self.accelerator.clip_grad_norm_(lane.parameters(), self.args.max_grad_norm or math.inf)
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    @property
    def _unwrapped(self) -> nn.Module:
        return self.accelerator.unwrap_model(self.module)

    # ---- checkpoints ----

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        """Start to write a checkpoint, once the one before is complete. Collective."""
        self.beat("waiting for the checkpoint before to be complete")
        self.guard.flush()
        self.writer.wait()
        self.beat("saving a checkpoint")
        self.check_space()
        save_checkpoint(self, model)

    def save_last(self) -> None:
        """Save the step that the run stands at, unless its newest checkpoint is of it. Collective."""
        self.writer.wait()
        # One rank looks: a shared disk may show the others an older listing.
        newest = from_main_rank(lambda: checkpoint.last_checkpoint(self.output_dir))
        if newest != self.output_dir / f"checkpoint-{self.state.global_step}":
            self._save_checkpoint(self.model_wrapped)
            self.writer.wait()

    def check_space(self) -> None:
        """Raise NoSpaceError on all ranks unless the disk holds another checkpoint. Collective; one rank looks."""
        trained, has_ema = trained_shapes(self), bool(self.args.ema_decay)
        optim = OptimizerNames(self.args.optim).value
        place, engine = self.output_dir, self.engine
        from_main_rank(lambda: checkpoint.check_space(place, trained, optim=optim, has_ema=has_ema, engine=engine))

    @property
    def module(self) -> nn.Module:
        """The denoiser or pair, without what an engine wraps around it (under FSDP2 sharded in place)."""
        assert isinstance(self.model, nn.Module)
        return self.model

    @property
    def output_dir(self) -> Path:
        assert self.args.output_dir is not None
        return Path(self.args.output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Nothing: Trainer calls this before preparation for some engines; `resume` loads after it for all."""

    # ---- validation ----

    @property
    def data_rank(self) -> int:
        """Which share of the samples this process gets."""
        return self.dims.data_rank(self.args.process_index)

    def evaluated_weights(self) -> AbstractContextManager[None]:
        """The weights that validation looks at: the moving average where asked for, and there is one already."""
        return self.ema.swapped() if self.args.eval_ema and self.ema is not None else nullcontext()

    def prepare_evaluation(self) -> None:
        """Compute in the precision of training where nothing is going to be trained: no optimizer, no DDP.

        FSDP2 has its own in its policy.
        """
        if self.engine != "fsdp2":
            prepare = self.accelerator.prepare_model
            self.lanes = {name: prepare(lane, evaluation_mode=True) for name, lane in self.lanes.items()}

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Run forwards alone, outside of training, with the weights that validation looks at."""
        self.guard.flush()
        for lane in self.lanes.values():
            lane.eval()
        with torch.no_grad(), self.evaluated_weights():
            yield
        for lane in self.lanes.values():
            if isinstance(lane, FSDPModule):
                lane.reshard()  # the root stays gathered after a forward without a backward

    @contextmanager
    def untimed(self) -> Iterator[None]:
        """Keep what is done here out of the throughput that the next log line shows."""
        started = time.perf_counter()
        yield
        self._logged.started += time.perf_counter() - started

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Losses over the fixed draws (`wan_accel.validation.as_metrics`). Collective."""
        with self.untimed():
            metrics = as_metrics(fixed_losses(self, self.eval_draws), metric_key_prefix)
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # ---- logging ----

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        self.beat("waiting for data")
        started = time.perf_counter()
        items, num_items = super().get_batch_samples(*args, **kwargs)
        self._logged.data_seconds += time.perf_counter() - started
        check_items(items)
        return items, num_items

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add throughput and memory of the interval since the last training line."""
        self.guard.flush()
        logs = self.guard.correct(logs)
        if "loss" in logs:
            seconds = time.perf_counter() - self._logged.started
            logs |= self._logged.by_expert() if len(self.lanes) > 1 else {}
            logs |= self.throughput.take(seconds)
            logs["data_wait"] = round(self._logged.data_seconds / seconds, 4)
            if self._logged.save_seconds:
                logs["save_wait"] = round(self._logged.save_seconds / seconds, 4)
            logs["peak_gib"] = round(peak_gib(self.accelerator.device), 3)
            self._logged = Interval()
        # Trainer sees one endless epoch, as the step sampler has no length.
        self.state.epoch = round(self.plan.epochs_at(self.state.global_step), 4)
        super().log(logs, start_time)
