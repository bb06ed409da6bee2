"""Train a recipe: `accelerate launch --config_file CONFIG -m wan_accel.train RECIPE [key=value ...]`."""

import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from wan_accel import checkpoint
from wan_accel.arguments import WanTrainingArguments
from wan_accel.assemble import assemble_experts, techniques_of
from wan_accel.checkpoint_writer import SaveError
from wan_accel.data.collate import SampleError
from wan_accel.data.latents import LatentsDataset
from wan_accel.data.mixture import MixedLatents
from wan_accel.data.provenance import removed_clips, warn_of_removed
from wan_accel.default_plan import default_plan
from wan_accel.draws import SampleDraw, describe_buckets
from wan_accel.held_out import fixed_draws, split_groups
from wan_accel.live import load_live_encoder, open_live
from wan_accel.logs import log_failure, log_to_file, start_logging
from wan_accel.metrics import write_run_state
from wan_accel.models.loading import CheckpointReader
from wan_accel.models.variants import Expert, get_variant
from wan_accel.nonfinite import NonFiniteError
from wan_accel.parallel.agreement import announce_failure, announced_failure, from_main_rank
from wan_accel.parallel.cpu import enable_fsdp_on_cpu
from wan_accel.parallel.engine import launched_engine, launched_offload
from wan_accel.parallel.mesh import ParallelDims
from wan_accel.parallel.names import is_zero
from wan_accel.parallel.replicas import launched_replicas
from wan_accel.parallel.restarts import meet_anew
from wan_accel.plan.misfit import check_fit
from wan_accel.preemption import die_with_parent
from wan_accel.recipe.arguments import training_arguments
from wan_accel.recipe.check import check
from wan_accel.recipe.commandline import parse_overrides, recipe_parser
from wan_accel.recipe.load import load_recipe, to_yaml
from wan_accel.recipe.schema import OnMisfit, Recipe
from wan_accel.sample_schedule import choose_rows
from wan_accel.sample_videos import add_sampling
from wan_accel.sources import open_source
from wan_accel.step_plan import StepPlan
from wan_accel.trainer import WanTrainer
from wan_accel.weights import open_weights

logger = logging.getLogger("wan_accel")
_VERSIONS = ("wan-accel", "torch", "accelerate", "deepspeed", "transformers", "datasets", "peft", "diffsynth")


def main(argv: list[str] | None = None) -> int:
    """Train; returns the exit code (2 for input that cannot be used, said in one line)."""
    parser = recipe_parser("Train a recipe.")
    parser.add_argument("--print-config", action="store_true", help="print the resolved recipe and stop")
    arguments = parse_overrides(parser, argv)
    start_logging()
    die_with_parent()
    meet_anew()
    try:
        recipe = load_recipe(arguments.recipe, arguments.overrides)
        if arguments.print_config:
            sys.stdout.write(to_yaml(recipe))
            return 0
        trainer = build_trainer(recipe, on_misfit=recipe.plan.on_misfit)
        trainer.check_space()
        resume = resume_path(recipe, trainer.args)
        if trainer.args.should_save:  # only now: a run that is refused must not touch another one's folder
            write_run_file(recipe, trainer.args, trainer.source.keys)
        log_to_file(trainer.output_dir, trainer.args.process_index)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    try:
        return run(trainer, resume)
    except (checkpoint.NoSpaceError, SaveError, NonFiniteError, SampleError) as error:
        sys.stderr.write(f"\nerror: {error}\n")  # the progress bar is on the line above
        return 2
    except Exception:
        if announced_failure() is None:
            raise
        return 2  # a collective was broken off by a rank that has said why


def build_trainer(
    recipe: Recipe, readers: Mapping[str, CheckpointReader] | None = None, *, on_misfit: OnMisfit | None = None
) -> WanTrainer:
    """Everything between a recipe and a trainer ready to run. Collective.

    Args:
        recipe: the recipe.
        readers: weights of each expert to start from, those of `model.checkpoint` by default.
        on_misfit: what to do where training will not fit the GPUs; nothing is compared by default.

    Raises:
        ValueError: the recipe, dataset, checkpoint or layout cannot be used; nothing has been written.
    """
    enable_fsdp_on_cpu()
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    problems = check(recipe, world_size=world_size, engine=launched_engine(), offload=launched_offload())
    if problems:
        raise ValueError("\n".join([f"{len(problems)} problems in the recipe:", *problems]))
    args = WanTrainingArguments(**{**training_arguments(recipe), **_launch_arguments()})
    device = args.device  # sets the process group up
    variant = get_variant(recipe.variant)
    experts = variant.trained_experts(recipe.model.expert)
    source = open_source(recipe, variant)
    _summarise(recipe, source, args)
    live = open_live(recipe, variant, source)  # before weights are read, which takes minutes
    applied = techniques_of(recipe, args.seed)
    readers = readers or {expert.name: open_weights(recipe, expert.name, applied.lora) for expert in experts}
    plan, eval_draws = plan_data(recipe, args, source, experts)
    buckets = [plan.index.buckets[row] for row in plan.rows.tolist()]
    if args.process_index == 0:
        logger.info("training on %s", describe_buckets(buckets, variant.num_tokens))
    if on_misfit is not None:
        check_fit(recipe, on_misfit, shapes=readers[experts[0].name], buckets=buckets, device=device)
    model = assemble_experts(
        variant,
        readers,
        replace(applied, num_shapes=plan.num_shapes),
        engine=launched_engine(),
        dims=ParallelDims(
            world_size=args.world_size, ulysses=args.ulysses, dp_replicate=launched_replicas()
        ),
        device=device,
    )
    trainer = WanTrainer(
        model,
        args,
        source,
        plan,
        variant=variant,
        expert=recipe.model.expert or experts[0].name,
        lora=applied.lora,
        base=recipe.model.checkpoint,
        eval_draws=eval_draws,
        data=source.digest,
        live=(live, load_live_encoder(recipe, variant, device)) if live is not None else None,
    )
    add_sampling(trainer, recipe)
    return trainer


def _summarise(recipe: Recipe, source: LatentsDataset | MixedLatents, args: WanTrainingArguments) -> None:
    """Warn of clips that are trained on though their clips dataset, where there is one, has lost them."""
    if recipe.data.clips is None or args.process_index != 0 or not isinstance(source, LatentsDataset):
        return
    clips = Path(recipe.data.clips)
    if not (clips / "state.json").is_file():  # training needs the latents only
        return
    try:
        warn_of_removed(removed_clips(source, clips), source.root, clips)
    except ValueError as error:
        logger.warning("data.clips=%s cannot be compared with the latents: %s", clips, error)


def _launch_arguments() -> dict[str, Any]:
    """What TrainingArguments need to be told of the launch.

    Under DeepSpeed they have to repeat the accelerate config's precision, and must not say that a job without a GPU
    uses the CPU: accelerate would leave DeepSpeed out.
    """
    with_deepspeed = is_zero(launched_engine())
    arguments: dict[str, Any] = {}
    if with_deepspeed and os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16":
        arguments["bf16"] = True
    if not torch.cuda.is_available():
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            arguments["ddp_backend"] = "gloo"
        if not with_deepspeed:
            arguments["use_cpu"] = True
    return arguments


def plan_data(
    recipe: Recipe, args: WanTrainingArguments, source: LatentsDataset | MixedLatents, experts: Sequence[Expert]
) -> tuple[StepPlan, list[SampleDraw]]:
    """The step plan over the training rows, and fixed draws over the validation rows.

    Without a validation split (`data.eval.fraction: 0`) validation uses the training rows, which shows learning
    but not generalisation; the log says so.
    """
    train_rows, eval_rows = split_groups(source.group_ids, fraction=recipe.data.eval.fraction, seed=args.seed)
    mixture = source.mixture(train_rows, seed=args.seed) if isinstance(source, MixedLatents) else None
    plan = default_plan(source, args, get_variant(recipe.variant), experts, train_rows, mixture)
    if not recipe.validation.every_steps:
        return plan, []
    if not eval_rows:
        logger.info("data.eval.fraction is 0: validation uses the training rows with fixed noise")
        eval_rows = train_rows
    if recipe.validation.sample is not None:
        choose_rows(eval_rows, source.group_ids, recipe.validation.sample.num_clips)  # refuse before weights are read
    return plan, [
        draw
        for expert in experts
        for draw in fixed_draws(source.index(), eval_rows, num_sigmas=args.eval_sigmas, seed=args.seed, expert=expert)
    ]


def resume_path(recipe: Recipe, args: WanTrainingArguments) -> str | None:
    """Where to resume from: `auto` is the newest complete checkpoint of the output_dir, if there is one. Collective.

    Rank 0 looks: a shared disk may show other ranks an older listing.

    Raises:
        ValueError: a named checkpoint is not complete, or the output_dir holds a run that is not to be resumed.
    """
    return from_main_rank(lambda: _resume_path(args))


def _resume_path(args: WanTrainingArguments) -> str | None:
    wanted = args.resume_from_checkpoint
    newest = checkpoint.last_checkpoint(Path(str(args.output_dir)))
    if wanted in (None, False, "false", "never"):
        if newest is not None:
            raise ValueError(
                f"training.output_dir={args.output_dir} holds checkpoints of another run ({newest.name}): choose "
                "another folder, or set training.resume_from_checkpoint: auto to go on with it"
            )
        return None
    if wanted == "auto" or wanted is True:
        return str(newest) if newest is not None else None
    step = checkpoint.read_manifest(Path(wanted)).step
    if newest is not None and checkpoint.read_manifest(newest).step > step:
        raise ValueError(
            f"training.output_dir={args.output_dir} holds {newest.name}, newer than {wanted}: a run that goes on from "
            "there would be mixed up with it. Choose another output_dir, or move the newer checkpoints away"
        )
    return str(wanted)


def write_run_file(recipe: Recipe, args: WanTrainingArguments, keys: dict[str, str]) -> None:
    """`run.json` (versions, layout, keys of the cached conditions) and `recipe.yaml` (resolved) in the output_dir."""
    output = Path(str(args.output_dir))
    output.mkdir(parents=True, exist_ok=True)
    (output / "recipe.yaml").write_text(to_yaml(recipe))
    run: dict[str, Any] = {
        "versions": {name: version(name) for name in _VERSIONS},
        "world_size": args.world_size,
        "ulysses": args.ulysses,
        "engine": launched_engine(),
        "dataset_keys": keys,
    }
    (output / "run.json").write_text(json.dumps(run, indent=1))


def run(trainer: WanTrainer, resume: str | None) -> int:
    """Train, save the end and evaluate it; write `run_state.json` whatever happens."""
    set_seed(trainer.args.seed)
    try:
        with trainer.watched():
            _train_to_the_end(trainer, resume)
    except BaseException as error:
        log_failure(error)
        reason = f"{type(error).__name__}: {error}"
        if is_alone := isinstance(error, SampleError):
            announce_failure(reason)
        if trainer.args.should_save or is_alone:
            write_run_state(trainer.output_dir, "failed", trainer.state.global_step, announced_failure() or reason)
        trainer.writer.settle()
        raise
    if trainer.args.should_save:
        state = "preempted" if trainer.preemption.stopped else "finished"
        write_run_state(trainer.output_dir, state, trainer.state.global_step)
    return 0


def _train_to_the_end(trainer: WanTrainer, resume: str | None) -> None:
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_last()  # before anything that may fail
    evaluated = {line["step"] for line in trainer.state.log_history if "eval_loss" in line}
    is_due = trainer.eval_draws and trainer.state.global_step not in evaluated
    if is_due and not trainer.preemption.stopped:
        trainer.evaluate()


if __name__ == "__main__":
    sys.exit(main())
