"""Draw videos of validation clips during training: when, on which ranks, and what happens when it fails."""

import logging
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from wan_accel.data.latents import LatentsDataset
from wan_accel.data.mixture import MixedLatents
from wan_accel.draws import SampleDraw
from wan_accel.models.hub import resolve_checkpoint
from wan_accel.recipe.schema import Recipe, SampleVideos
from wan_accel.sample_drawing import draw_share, gather, sample_draws
from wan_accel.sample_files import SampleFiles, SampleWriter
from wan_accel.sample_schedule import choose_rows, drawn_sigmas
from wan_accel.sample_trackers import log_samples
from wan_accel.trainer import WanTrainer

logger = logging.getLogger("wan_accel")


class VideoSampler:
    """Draws the same clips from a trainer's weights whenever it is asked to, and writes them on the main rank.

    Args:
        trainer: over a `LatentsDataset`, with validation draws: videos are of their rows.
        settings: how many clips and steps.
        checkpoint: folder with the VAE.
        folder: what to write below.
        clips: the clips dataset, for `ground_truth: clips`.

    Raises:
        ValueError: more clips than validation has, no step for the trained expert, or no cached null conditions.
    """

    def __init__(
        self, trainer: WanTrainer, settings: SampleVideos, *, checkpoint: Path, folder: Path, clips: Path | None = None
    ) -> None:
        assert isinstance(trainer.source, LatentsDataset | MixedLatents)
        self.trainer = trainer
        self.settings = settings
        self.source = trainer.source
        eval_rows = sorted({draw.index for draw in trainer.eval_draws})
        rows = choose_rows(eval_rows, self.source.group_ids, settings.num_clips)
        self.draws: list[SampleDraw] = sample_draws(self.source.index(), rows, seed=trainer.args.seed)
        self.sigmas = drawn_sigmas(settings.num_steps, trainer.variant.shift, trainer.plan.experts)
        if settings.guidance != 1.0:
            self.source.unconditional({"text": torch.empty(1, 1, 1)})  # fails here rather than hours later
        from_clips = clips if settings.ground_truth == "clips" else None
        device = trainer.accelerator.device
        self.writer = SampleWriter(trainer.variant, checkpoint, folder, device=device, clips=from_clips)

    def share(self) -> dict[int, Tensor]:
        """Draw this data rank's clips. Every rank calls it."""
        return draw_share(self.trainer, self.draws, self.settings)

    def write(self, name: str, drawn: dict[int, Tensor]) -> SampleFiles:
        """Decode and write what all ranks have drawn, on one process."""
        items = [
            (self.source.clip_info(draw.index), drawn[position], self._cached(draw))
            for position, draw in enumerate(self.draws)
        ]
        return self.writer.write(name, items, title=self.title(name))

    def _cached(self, draw: SampleDraw) -> Tensor:
        return self.source.sample(draw.index, draw)["latents"][:, self.trainer.variant.reference_frames :]

    def title(self, name: str) -> str:
        """What the videos are, for the top of the contact sheet."""
        settings, variant = self.settings, self.trainer.variant
        parts = [variant.name, name.replace("-", " "), f"{len(self.sigmas) - 1} Euler steps, shift {variant.shift:g}"]
        parts.append(f"guidance {settings.guidance:g}" if settings.guidance != 1.0 else "no guidance")
        experts = self.trainer.plan.experts
        if min(expert.sigma_min for expert in experts) > 0:
            parts.append(f"{experts[0].name} expert alone: its x_0 prediction at sigma {self.sigmas[-2]:.2f}")
        elif max(expert.sigma_max for expert in experts) < 1:
            parts.append(f"{experts[0].name} expert alone: from the ground truth noised to sigma {self.sigmas[0]:.2f}")
        return " · ".join(parts)


class SampleCallback(TrainerCallback):
    """Draws videos every so many steps, before the first step, and at the end. All ranks run it.

    It draws before the step that follows, and at the end saves first, so a checkpoint of the same step is on disk
    already. Neither a full disk or tracker nor running out of memory ends the run, but for a sharded model: there one
    rank that runs out of memory cannot give up without leaving the others in a collective.
    """

    def __init__(self, trainer: WanTrainer, sampler: VideoSampler, *, every_steps: int) -> None:
        self.trainer = trainer
        self.sampler = sampler
        self.every_steps = every_steps
        self.enabled = True

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step % self.every_steps == 0:
            self.draw(state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.save_last()  # the trackers close here too, so videos cannot wait for whoever ran the trainer
        if not self.trainer.preemption.stopped:
            self.draw(state.global_step)

    def draw(self, step: int) -> None:
        """Draw and write `step-N`, unless a run that was resumed has it already. Collective."""
        name = f"step-{step}"
        is_there = _from_main(self.trainer, (self.sampler.writer.folder / name).is_dir())
        if self.enabled and not is_there:
            with self.trainer.untimed():
                self._draw(name, step)

    def _draw(self, name: str, step: int) -> None:
        drawn = gather(self._share_or_error())
        error = drawn if isinstance(drawn, str) else None
        if not isinstance(drawn, str) and self.trainer.is_world_process_zero():
            error = self._write_or_error(name, drawn, step)
        if _from_main(self.trainer, error) == _OUT_OF_MEMORY:
            self.enabled = False
            if self.trainer.is_world_process_zero():
                logger.error("no more videos in this run: the clips are too large beside training, which goes on")

    def _share_or_error(self) -> dict[int, Tensor] | str:
        try:
            return self.sampler.share()
        except torch.OutOfMemoryError as error:
            if self.trainer.engine in ("fsdp2", "zero3") or self.trainer.args.ulysses > 1:
                raise
            logger.error("drawing videos ran out of memory: %s", error)
            return _OUT_OF_MEMORY

    def _write_or_error(self, name: str, drawn: dict[int, Tensor], step: int) -> str | None:
        """Write and log on the main rank; whatever fails (memory, disk, a tracker) is logged, not raised."""
        try:
            files = self.sampler.write(name, drawn)
            log_samples(self.trainer.callback_handler.callbacks, files, step=step)
            logger.info("step %d: %d videos in %s", step, len(files.videos), files.sheet.parent)
        except Exception as error:
            logger.exception("the videos of step %d could not be written or logged", step)
            return _OUT_OF_MEMORY if isinstance(error, torch.OutOfMemoryError) else str(error)
        return None


_OUT_OF_MEMORY = "out of memory"


def _from_main(trainer: WanTrainer, value: Any) -> Any:
    """The main rank's value, on every rank. Collective."""
    holder = [value]
    if trainer.args.world_size > 1:
        broadcast_object_list(holder)
    return holder[0]


def add_sampling(trainer: WanTrainer, recipe: Recipe) -> None:
    """Let a trainer draw videos as its recipe says; nothing without `validation.sample`."""
    settings = recipe.validation.sample
    if settings is None:
        return
    sampler = video_sampler(trainer, recipe, settings, folder=trainer.output_dir / "samples")
    callback = SampleCallback(
        trainer, sampler, every_steps=settings.every_steps or recipe.validation.every_steps
    )
    # Before the trackers' callbacks, which close at the end of training.
    trainer.callback_handler.callbacks.insert(0, callback)


def video_sampler(trainer: WanTrainer, recipe: Recipe, settings: SampleVideos, *, folder: Path) -> VideoSampler:
    """The sampler of a recipe's clips."""
    clips = Path(recipe.data.clips) if recipe.data.clips is not None else None
    checkpoint = resolve_checkpoint(recipe.model.checkpoint, recipe.model.revision)
    return VideoSampler(trainer, settings, checkpoint=checkpoint, folder=folder, clips=clips)
