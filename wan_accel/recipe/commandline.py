"""The command line that train, cache and evaluate share: a recipe and overrides. Torch-free."""

import argparse
import logging
import os
from collections.abc import Sequence


def recipe_parser(description: str) -> argparse.ArgumentParser:
    """A parser with the recipe; add options to it and parse with `parse_overrides`."""
    parser = argparse.ArgumentParser(
        description=description,
        allow_abbrev=False,
        epilog="Overrides follow as key=value or --key value, e.g. training.max_steps=10.",
    )
    parser.add_argument("recipe", help="a YAML file, or the name of a shipped recipe such as animate-14b/lora")
    return parser


def parse_overrides(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse; what is no option of the parser becomes `overrides`, in order."""
    arguments, overrides = parser.parse_known_args(argv)
    arguments.overrides = overrides
    return arguments


def log_on_main_rank() -> None:
    """Log information on the main rank, warnings on all."""
    level = logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
