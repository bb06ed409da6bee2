"""The recipe's sections as dataclasses; pydantic validates them, all problems at once. Torch-free."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

_STRICT = ConfigDict(extra="forbid", strict=False)
Probability = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(ge=1)]
OnMisfit = Literal["warn", "error"]


@dataclass(frozen=True, kw_only=True, slots=True)
class FusedLora:
    """A LoRA that is added to the base weights, times `scale`, while they are read."""

    __pydantic_config__ = _STRICT
    path: str
    scale: Annotated[float, Field(allow_inf_nan=False)] = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """Where weights come from. `expert` is high or low for A14B pairs, or both to train the pair in one run.

    `checkpoint` is a folder or file in the original, DiffSynth or diffusers layout, or a hub id; `revision` is of the
    hub id.

    `torch_dtype` is that of the base weights in memory: bfloat16 halves a LoRA's frozen base; full training needs
    float32 masters. `attention` is the kernel of the blocks' attention: torch's choice for the inputs, or one by name.
    """

    __pydantic_config__ = _STRICT
    checkpoint: str
    revision: str | None = None
    expert: Literal["high", "low", "both"] | None = None
    torch_dtype: Literal["float32", "bfloat16"] = "float32"
    attention: Literal["sdpa", "cudnn", "flash_2", "flash_3"] = "sdpa"
    fuse_loras: list[FusedLora] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True, slots=True)
class MovingAverage:
    """An exponential moving average of the trained weights, updated every so many optimizer steps, in fp32."""

    __pydantic_config__ = _STRICT
    decay: Annotated[float, Field(gt=0, lt=1)] = 0.9999
    update_every: Positive = 1
    device: Literal["accelerator", "cpu"] = "accelerator"


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """LoRA (names as in peft.LoraConfig) or full training.

    `init_from` is what training starts from: a LoRA file of any tool, or for full training a DiT in any layout.
    `target_modules` are name suffixes of linear layers, or words for groups of them: default, face, image
    (`wan_accel.lora`).
    """

    __pydantic_config__ = _STRICT
    kind: Literal["lora", "full"]
    r: Positive = 32
    lora_alpha: Annotated[float, Field(gt=0)] = 32.0
    target_modules: Literal["default"] | list[str] = "default"
    init_from: str | None = None
    ema: MovingAverage | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """A number of samples, or a budget of tokens: then short and small clips come in larger batches.

    multiple_of: under a budget, samples of a bucket are rounded down to a multiple of it; a multiple of the data ranks
        keeps all of them busy.
    """

    __pydantic_config__ = _STRICT
    samples: Positive | None = None
    tokens: Positive | None = None
    multiple_of: Positive = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Eval:
    """The validation split; clips of one source stay together. 0 means validation on the training rows."""

    __pydantic_config__ = _STRICT
    fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A latents folder of a mixture. `weight` is its share of an epoch relative to the others', by default its rows."""

    __pydantic_config__ = _STRICT
    path: str
    weight: Annotated[float, Field(gt=0)] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Data:
    """Datasets and batches. `global_batch` is over all ranks, `micro_batch` what a rank runs at once; 1 sample each.

    latents: the folder that the cache writes and training reads; `datasets` instead trains on several.
    captions: a file of captions by clip_id, in place of the clips' own. where: which clips, an expression.
    on_the_fly: conditions that training encodes itself, anew for every draw, from `clips`.
    augment, augment_caption: `package.module:function` for the frames or captions of those.
    image_dropout: the share of samples that ti2v-5b is trained on without their first frame.
    """

    __pydantic_config__ = _STRICT
    latents: str | None = None
    datasets: list[Part] = field(default_factory=list)
    clips: str | None = None
    captions: str | None = None
    where: str | None = None
    on_the_fly: list[Literal["video", "text", "known"]] = field(default_factory=list)
    augment: str | None = None
    augment_caption: str | None = None
    global_batch: Batch = field(default_factory=lambda: Batch(samples=1))
    micro_batch: Batch = field(default_factory=lambda: Batch(samples=1))
    caption_dropout: Probability = 0.0
    face_dropout: Probability = 0.0
    image_dropout: Probability = 0.0
    eval: Eval = field(default_factory=Eval)


@dataclass(frozen=True, kw_only=True, slots=True)
class Cache:
    """How conditions are encoded. `known_variants` are drawn a clip; training picks one an epoch.

    `shard_text_encoder` splits umT5 over all processes while captions are encoded.
    """

    __pydantic_config__ = _STRICT
    known_variants: Annotated[int, Field(ge=0)] = 4
    shard_text_encoder: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Objective:
    """Density of sigma, its shift (the variant's by default) and the weighting of the loss.

    `preset: diffsynth` is DiffSynth's loss: uniform, shift 5, bell weighting; it takes no other key. `logit_mean` and
    `logit_std` belong to the logit_normal density, `mode_scale` to mode.

    `on_nan` is what a step whose loss or gradient is not finite does: stop the run, or skip that optimizer step.
    """

    __pydantic_config__ = _STRICT
    preset: Literal["diffsynth"] | None = None
    density: Literal["uniform", "logit_normal", "mode"] = "uniform"
    shift: Annotated[float, Field(gt=0)] | None = None
    logit_mean: float = 0.0
    logit_std: Annotated[float, Field(gt=0)] = 1.0
    mode_scale: Annotated[float, Field(ge=-1, le=1.75)] = 1.29
    weighting: Literal["none", "bell"] = "none"
    on_nan: Literal["stop", "skip"] = "stop"


@dataclass(frozen=True, kw_only=True, slots=True)
class Parallel:
    """Sequence parallelism; everything else about parallelism is in the accelerate config."""

    __pydantic_config__ = _STRICT
    ulysses: Positive = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """What costs memory and what costs time.

    activation_checkpointing: `full` recomputes every block in the backward pass; `attention` keeps the outputs of
        attention and of Ulysses' exchanges and recomputes the rest; `none` keeps everything; a number in (0, 1) lets
        the compiler keep that share of it.
    compile: compile the blocks.
    fp8: matrix products of the blocks' base linears in 8 bits.
    """

    __pydantic_config__ = _STRICT
    activation_checkpointing: Literal["full", "attention", "none"] | Annotated[float, Field(gt=0, lt=1)] = "attention"
    compile: bool = False
    fp8: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What happens where a run will not fit its GPUs, by the formula of `wan-accel plan`, before weights are read.

    on_misfit: `warn` and go on, or stop with an error. Nothing is compared where there are no GPUs.
    """

    __pydantic_config__ = _STRICT
    on_misfit: OnMisfit = "warn"


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleVideos:
    """Videos drawn from the live weights: clips, Euler steps, classifier-free guidance (1 means none).

    `every_steps` is that of validation by default. `ground_truth` is what they are shown beside: `latents` decodes
    the cached ones, `clips` takes the frames of data.clips.
    """

    __pydantic_config__ = _STRICT
    num_clips: Positive = 4
    num_steps: Positive = 30
    guidance: Annotated[float, Field(ge=0)] = 1.0
    every_steps: Positive | None = None
    ground_truth: Literal["latents", "clips"] = "latents"


@dataclass(frozen=True, kw_only=True, slots=True)
class Validation:
    """Fixed-noise loss every so many steps, at `sigmas` noise levels a clip; 0 steps means never.

    `ema` validates the moving average (`method.ema`) instead of the weights.
    """

    __pydantic_config__ = _STRICT
    every_steps: Annotated[int, Field(ge=0)] = 0
    sigmas: Positive = 8
    ema: bool = False
    sample: SampleVideos | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """A whole run. `training` is checked against the TrainingArguments table (`wan_accel.recipe.arguments`)."""

    __pydantic_config__ = _STRICT
    variant: str
    model: Model
    method: Method
    data: Data
    cache: Cache = field(default_factory=Cache)
    objective: Objective = field(default_factory=Objective)
    parallel: Parallel = field(default_factory=Parallel)
    memory: Memory = field(default_factory=Memory)
    plan: Plan = field(default_factory=Plan)
    validation: Validation = field(default_factory=Validation)
    training: dict[str, Any] = field(default_factory=dict)
