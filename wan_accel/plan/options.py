"""Options of the command `wan-accel plan`. Torch-free."""

import argparse
from pathlib import Path

from wan_accel.plan.verdict import RESERVE


def add_options(parser: argparse.ArgumentParser) -> None:
    """Overrides of the recipe are what these leave over."""
    parser.add_argument("recipe", help="a YAML file, or the name of a shipped recipe")
    parser.add_argument("--config_file", type=Path, required=True, help="the accelerate config of the launch")
    parser.add_argument("--num_processes", type=int, help="GPUs; those of the accelerate config by default")
    parser.add_argument("--num_machines", type=int, help="of the launch, for HSDP; that of the config or 1 by default")
    parser.add_argument("--gpu_memory", metavar="SIZE", help="of one GPU, e.g. 80GiB; that of --gpu by default")
    parser.add_argument("--gpu", help="a row of the table, to predict times for; all rows of this memory by default")
    parser.add_argument("--gpus", type=Path, metavar="FILE", help="YAML with rows before those of the table")
    parser.add_argument("--shape", action="append", default=[], metavar="FRAMES,HEIGHT,WIDTH",
                        help="of clips, instead of those in data.latents; once for each bucket")  # fmt: skip
    parser.add_argument("--samples", type=int, default=1, help="clips of each --shape, for the size of the latents")
    parser.add_argument("--reserve", type=float, default=RESERVE, help="share of the memory that is left free")
    parser.add_argument("--search", action="store_true", help="look for the fastest layouts that fit")
    parser.add_argument("--json", action="store_true", help="print JSON")
