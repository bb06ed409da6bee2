"""The `wan-accel` command: recipes, check, plan, doctor, download, init-tiny, checkpoint, export, push."""

import argparse
import logging
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wan_accel import doctor_finding
from wan_accel.plan import options as plan_options
from wan_accel.recipe.check import check, read_engine, read_offload
from wan_accel.recipe.load import find_recipe, load_recipe, recipes_folder, shipped_recipes


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit code, 2 for input that cannot be used."""
    parser = _parser()
    arguments, overrides = parser.parse_known_args(argv)
    if overrides and arguments.run not in (_check, _plan, _doctor, _download):
        parser.error(f"unrecognized arguments: {' '.join(overrides)}")
    arguments.overrides = overrides
    logging.basicConfig(format="%(message)s")
    logging.getLogger("wan_accel").setLevel(logging.INFO)  # and of what it uses, warnings
    try:
        return arguments.run(arguments)
    except Exception as error:
        if not isinstance(error, _expected_errors()):
            raise
        sys.stderr.write(f"error: {error}\n")
        return 2


def _expected_errors() -> tuple[type[Exception], ...]:
    """Input that cannot be used, and what disks and hubs do; imported late, as listing recipes needs none of it."""
    from huggingface_hub.errors import HfHubHTTPError
    from safetensors import SafetensorError

    from wan_accel.models.errors import ReadBackError

    return (ValueError, OSError, SafetensorError, HfHubHTTPError, ReadBackError)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="wan-accel", description="Train the Wan2.2 video diffusion models.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    recipes = commands.add_parser("recipes", help="list, show or copy the shipped recipes")
    actions = recipes.add_subparsers(required=True, metavar="ACTION")
    actions.add_parser("list", help="names, one a line").set_defaults(run=_list)
    actions.add_parser("path", help="the folder they are in").set_defaults(run=_path)
    show = actions.add_parser("show", help="print one")
    show.add_argument("recipe")
    show.set_defaults(run=_show)
    copy = actions.add_parser("copy", help="copy one to edit it")
    copy.add_argument("recipe")
    copy.add_argument("target", type=Path)
    copy.set_defaults(run=_copy)

    checking = commands.add_parser("check", help="check a recipe (and overrides, key=value) without running it")
    checking.add_argument("recipe")
    checking.add_argument("--config_file", type=Path, help="the accelerate config it will be launched with")
    checking.add_argument("--num_processes", type=int, help="processes it will be launched with")
    checking.set_defaults(run=_check)

    planning = commands.add_parser("plan", help="what a recipe needs on so many GPUs: memory, time, disk")
    plan_options.add_options(planning)
    planning.set_defaults(run=_plan)

    doctor = commands.add_parser("doctor", help="what this machine lacks for training, and how fast its disk is")
    doctor_finding.add_options(doctor)
    doctor.add_argument("--config_file", type=Path, help="the accelerate config that training will be launched with")
    doctor.set_defaults(run=_doctor)

    fetching = commands.add_parser("download", help="fetch the checkpoint files that a recipe (and overrides) needs")
    fetching.add_argument("recipe")
    fetching.add_argument("--output", type=Path, help="a folder; by default where model.checkpoint is looked for")
    fetching.set_defaults(run=_download)

    tiny = commands.add_parser("init-tiny", help="write a tiny random checkpoint in the original layout")
    tiny.add_argument("variant")
    tiny.add_argument("output", type=Path)
    tiny.add_argument("--seed", type=int, default=0)
    tiny.set_defaults(run=_init_tiny)

    saved = commands.add_parser("checkpoint", help="look after a run's checkpoints")
    verifying = saved.add_subparsers(required=True, metavar="ACTION").add_parser(
        "verify", help="read every file and compare it with what was written"
    )
    verifying.add_argument("path", type=Path, help="a run's output_dir, or one of its checkpoints")
    verifying.add_argument("--json", action="store_true", help="a line of JSON a checkpoint")
    verifying.set_defaults(run=_verify)

    export = commands.add_parser("export", help="export a checkpoint of a run")
    export.add_argument("path", type=Path, help="a run's output_dir, or one of its checkpoints")
    export.add_argument("--layout", help="diffsynth, comfyui, diffusers or peft (LoRA); original (full weights)")
    export.add_argument("--merge", action="store_true", help="write the base with the LoRA in it, as full weights")
    export.add_argument("--ema", action="store_true", help="export the moving averages of the weights")
    export.add_argument("--output", type=Path, help="a folder, or a .safetensors file for one expert's LoRA")
    export.add_argument("--dtype", choices=["float32", "bfloat16"])
    export.add_argument("--push-to-hub", metavar="OWNER/NAME", help="upload the export to this model repository too")
    export.add_argument("--private", action="store_true", help="make that repository readable by its owner only")
    export.set_defaults(run=_export)

    pushing = commands.add_parser("push", help="upload what export wrote to a model repository of a hub")
    pushing.add_argument("path", type=Path, help="the export: a folder, or a .safetensors file with its .md beside")
    pushing.add_argument("repo_id", metavar="OWNER/NAME")
    pushing.add_argument("--private", action="store_true", help="make the repository readable by its owner only")
    pushing.set_defaults(run=_push)
    return parser


def _list(arguments: argparse.Namespace) -> int:
    print("\n".join(shipped_recipes()))
    return 0


def _path(arguments: argparse.Namespace) -> int:
    print(recipes_folder())
    return 0


def _show(arguments: argparse.Namespace) -> int:
    sys.stdout.write(find_recipe(arguments.recipe).read_text())
    return 0


def _copy(arguments: argparse.Namespace) -> int:
    if arguments.target.exists():
        raise ValueError(f"{arguments.target} exists: choose another file")
    arguments.target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(find_recipe(arguments.recipe), arguments.target)
    print(arguments.target)
    return 0


def _check(arguments: argparse.Namespace) -> int:
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    launch: dict[str, Any] = {}
    if (config := arguments.config_file) is not None:
        launch = {"engine": read_engine(config), "offload": read_offload(config)}
    problems = check(recipe, world_size=arguments.num_processes, **launch)
    for problem in problems:
        sys.stderr.write(f"error: {problem}\n")
    if not problems:
        print(f"{arguments.recipe}: no problems found")
    return 2 if problems else 0


def _plan(arguments: argparse.Namespace) -> int:
    from wan_accel.plan.run import run

    return run(arguments, arguments.overrides)


def _doctor(arguments: argparse.Namespace) -> int:
    job = doctor_finding.job_of(arguments, arguments.overrides)
    from wan_accel.doctor import examine, show

    return show(examine(job), is_json=arguments.json)


def _download(arguments: argparse.Namespace) -> int:
    from wan_accel.download import download

    print(download(load_recipe(arguments.recipe, arguments.overrides), output=arguments.output))
    return 0


def _init_tiny(arguments: argparse.Namespace) -> int:
    from wan_accel.tiny import init_tiny

    init_tiny(arguments.variant, arguments.output, seed=arguments.seed)
    print(f"{arguments.output}: a tiny {arguments.variant} checkpoint")
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from wan_accel import checkpoint_verify

    return checkpoint_verify.run(arguments.path, as_json=arguments.json)


def _export(arguments: argparse.Namespace) -> int:
    import torch

    from wan_accel.export import describe, export

    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    path = export(
        arguments.path, layout=arguments.layout, output=arguments.output, dtype=dtype, merge=arguments.merge,
        ema=arguments.ema, push_to_hub=arguments.push_to_hub, private=arguments.private,
    )  # fmt: skip
    print(describe(path))
    return 0


def _push(arguments: argparse.Namespace) -> int:
    from wan_accel.push import push

    print(push(arguments.path, arguments.repo_id, private=arguments.private))
    return 0


if __name__ == "__main__":
    sys.exit(main())
