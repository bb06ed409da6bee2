"""The commands of README and guide are commands: they parse, and name recipes, configs and files that exist."""

import re
import shlex
from pathlib import Path

import pytest

from preprocessing import options as preprocess_options
from wan_accel import cli
from wan_accel.recipe.check import read_engine
from wan_accel.recipe.load import load_recipe

ROOT = Path(__file__).parents[1]
USERS_OWN = ("RECIPE", "my.yaml")


def commands() -> list[list[str]]:
    """Indented lines that start with a command, continuation lines joined."""
    guides = ("ANIMATE_PREPROCESSING", "TRAINING", "MULTI_GPU_TRAINING")
    texts = [(ROOT / name).read_text() for name in ("README.md", *(f"docs/{guide}.md" for guide in guides))]
    text = "\n".join(texts).replace("\\\n", " ")
    starts = ("wan-accel ", "wan-preprocess ", "accelerate launch ", "python -m wan_accel")
    lines = [line.strip() for line in text.splitlines() if line.startswith("    ")]
    return [shlex.split(line, comments=True) for line in lines if line.startswith(starts)]


@pytest.mark.parametrize("command", commands(), ids=lambda command: " ".join(command)[:60])
def test_command(command: list[str]) -> None:
    program, *arguments = command
    if program == "wan-preprocess":
        preprocess_options.parser().parse_args(arguments)
    elif program == "wan-accel":
        cli._parser().parse_args([word for word in arguments if "=" not in word])  # without overrides
    elif "-m" not in arguments:
        (script,) = [word for word in arguments if word.endswith(".py")]
        assert (ROOT / script).is_file()
        read_engine(ROOT / arguments[arguments.index("--config_file") + 1])
    else:
        module = arguments.index("-m")
        assert (ROOT / f"{arguments[module + 1].replace('.', '/')}.py").is_file()
        rest = [item for item in arguments[module + 3 :] if "=" in item]
        if arguments[module + 2] not in USERS_OWN:
            load_recipe(arguments[module + 2], rest)
        if "--config_file" in arguments:
            read_engine(ROOT / arguments[arguments.index("--config_file") + 1])


def test_there_are_commands_and_pictures() -> None:
    assert len(commands()) >= 12
    text = (ROOT / "README.md").read_text()
    for path in re.findall(r"\]\((docs/images/[^)]+)\)", text):
        assert (ROOT / path).is_file(), path


def test_the_demo_runs_the_readmes_commands() -> None:
    script = (ROOT / "demo" / "run.sh").read_text()
    for command in commands()[:8]:
        words = [
            word for word in command if word.startswith(("wan_accel.", "demo/animate", "animate", "inspect", "export"))
        ]
        assert all(word in script for word in words), command
