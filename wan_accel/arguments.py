"""WanTrainingArguments: transformers' TrainingArguments plus what a Wan run needs."""

from dataclasses import dataclass
from typing import Any

from transformers import TrainingArguments

from wan_accel.ema import EmaDevice
from wan_accel.nonfinite import OnNan
from wan_accel.objective import Density, Weighting
from wan_accel.parallel.config_checks import refuse_launched
from wan_accel.parallel.replicas import resolve_launched


@dataclass
class WanTrainingArguments(TrainingArguments):
    """Arguments of `WanTrainer`; recipes fill them (`wan_accel.recipe.arguments`).

    Fields beside those of `TrainingArguments`:

    global_batch: samples of an optimizer step over all ranks, the same whatever the number of ranks.
    micro_batch: samples a rank runs at once.
    global_batch_tokens, micro_batch_tokens: tokens instead of samples; None for samples.
    batch_multiple_of: under a budget of tokens, samples of a step are a multiple of it.
    ulysses: ranks that share one sample by sequence parallelism.
    density, shift, logit_mean, logit_std, mode_scale, weighting: the objective (`wan_accel.objective`).
    caption_dropout, face_dropout: probabilities of replacing the caption or face by its null condition.
    image_dropout: probability of leaving a fused first frame out (ti2v-5b trains on text alone then).
    eval_sigmas: noise levels at which each validation sample is evaluated.
    ema_decay, ema_update_every, ema_device: the moving average (`wan_accel.ema`); decay 0 means none.
    eval_ema: validate the moving average instead of the weights.
    async_save: write checkpoints beside training, from a copy in host memory (`wan_accel.checkpoint_writer`).
    hang_seconds: how long a rank may stay at one place before the run is given up (`wan_accel.watchdog`); 0: for ever.
    on_nan: `stop` or `skip` a step whose loss or gradient is not finite (`wan_accel.nonfinite`).
    """

    # Every trained parameter takes part in every forward of its expert, whatever is dropped, so DDP need not search
    # the graph for those that do not.
    ddp_find_unused_parameters: bool | None = False
    remove_unused_columns: bool = False
    logging_nan_inf_filter: bool = False
    log_on_each_node: bool = False
    logging_steps: float = 10
    save_total_limit: int | None = 3
    report_to: Any = "none"

    global_batch: int = 1
    micro_batch: int = 1
    global_batch_tokens: int | None = None
    micro_batch_tokens: int | None = None
    batch_multiple_of: int = 1
    ulysses: int = 1
    density: Density = "uniform"
    shift: float = 5.0
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29
    weighting: Weighting = "none"
    caption_dropout: float = 0.0
    face_dropout: float = 0.0
    image_dropout: float = 0.0
    eval_sigmas: int = 8
    ema_decay: float = 0.0
    ema_update_every: int = 1
    ema_device: EmaDevice = "accelerator"
    eval_ema: bool = False
    on_nan: OnNan = "stop"
    async_save: bool = True
    hang_seconds: float = 1200.0

    def __post_init__(self) -> None:
        """Look at the launch first: before weights are read, and before accelerate reads sizes it would not take.

        Raises:
            ValueError: the accelerate config asks for what training does not do, or its sizes do not fit.
        """
        refuse_launched()
        resolve_launched()
        super().__post_init__()
