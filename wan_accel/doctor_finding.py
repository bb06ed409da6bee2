"""What `wan-accel doctor` found, its two ways of saying so, and what it was asked about. Torch-free."""

import argparse
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from wan_accel.recipe.arguments import DEFAULTS
from wan_accel.recipe.check import read_engine
from wan_accel.recipe.load import load_recipe
from wan_accel.recipe.schema import Recipe

# A note is only to be known; a warning costs speed or may fail; with a problem a run cannot work.
Level = Literal["ok", "note", "warning", "problem"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One line of the report; `advice` is what to do, empty where nothing is."""

    name: str
    level: Level
    value: str
    advice: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What a machine is examined for.

    engine: as `read_engine` names it, None where unknown. output_dir: the checkpoint folder, which need not exist.
    disk_mib: size of the file that measures it. link_mib: of a collective's tensor, None for what suits the device.
    """

    recipe: Recipe | None = None
    engine: str | None = None
    output_dir: Path | None = None
    disk_mib: int = 256
    link_mib: int | None = None

    @property
    def num_workers(self) -> int:
        """Reading processes of each training process."""
        training = self.recipe.training if self.recipe is not None else {}
        return int(training.get("dataloader_num_workers", DEFAULTS["dataloader_num_workers"]))


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the command and of the module alike; overrides of the recipe are what they leave over."""
    parser.add_argument("recipe", nargs="?", help="a YAML file, or the name of a shipped recipe")
    parser.add_argument("--output_dir", type=Path, help="the folder to measure; the recipe's by default")
    parser.add_argument("--disk_mib", type=int, default=256, help="size of the file that measures it")
    parser.add_argument("--json", action="store_true", help="print a JSON list")


def job_of(arguments: argparse.Namespace, overrides: Sequence[str], engine: str | None = None) -> Job:
    """The job that parsed options ask about.

    Raises:
        ValueError: a recipe or a size that cannot be used.
    """
    if arguments.recipe is None and overrides:
        raise ValueError(f"{' '.join(overrides)} is neither an option nor, without a recipe, an override of one")
    link_mib = getattr(arguments, "link_mib", None)
    for option, size in (("--disk_mib", arguments.disk_mib), ("--link_mib", link_mib)):
        if size is not None and size < 1:
            raise ValueError(f"{option} {size}: give 1 or more")
    if (config := getattr(arguments, "config_file", None)) is not None:
        engine = read_engine(config)
    recipe = load_recipe(arguments.recipe, overrides) if arguments.recipe is not None else None
    folder = arguments.output_dir or (recipe.training.get("output_dir") if recipe is not None else None)
    return Job(
        recipe=recipe,
        engine=engine,
        output_dir=None if folder is None else Path(os.path.expanduser(folder)),
        disk_mib=arguments.disk_mib,
        link_mib=link_mib,
    )


def as_text(findings: Sequence[Finding]) -> str:
    """Aligned lines, advice on a line of its own, and a count of what is wrong at the end."""
    width = max((len(finding.name) for finding in findings), default=0)
    lines = []
    for finding in findings:
        lines.append(f"{finding.level:<8} {finding.name:<{width}}  {finding.value}")
        if finding.advice:
            lines.append(f"{'':<8} {'':<{width}}  -> {finding.advice}")
    counts = [sum(finding.level == level for finding in findings) for level in ("problem", "warning", "note")]
    lines.append(f"problems: {counts[0]}, warnings: {counts[1]}, notes: {counts[2]}")
    return "\n".join(lines)


def as_json(findings: Sequence[Finding]) -> str:
    return json.dumps([asdict(finding) for finding in findings], indent=2)


def exit_code(findings: Iterable[Finding]) -> int:
    """1 with a problem, 0 without one."""
    return int(any(finding.level == "problem" for finding in findings))
