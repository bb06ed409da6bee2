"""The `wan-accel` command."""

import subprocess
import sys
from pathlib import Path

import pytest

from wan_accel.cli import main
from wan_accel.recipe.load import load_recipe


def test_recipes(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["recipes", "list"]) == 0
    names = capsys.readouterr().out.split()
    assert "animate-14b/lora" in names and not any(name.startswith("accelerate/") for name in names)
    assert main(["recipes", "path"]) == 0
    folder = Path(capsys.readouterr().out.strip())
    assert (folder / "accelerate" / "fsdp2.yaml").is_file()
    assert main(["recipes", "show", "animate-14b/full"]) == 0
    assert capsys.readouterr().out == (folder / "animate-14b" / "full.yaml").read_text()
    for name in names:
        copied = tmp_path / "copies" / f"{name.replace('/', '-')}.yaml"
        assert main(["recipes", "copy", name, str(copied)]) == 0
        assert load_recipe(str(copied)) == load_recipe(name)  # what it inherits is found from anywhere
    capsys.readouterr()
    copy = tmp_path / "mine" / "recipe.yaml"
    assert main(["recipes", "copy", "animate-14b/lora", str(copy)]) == 0
    assert main(["recipes", "copy", "animate-14b/lora", str(copy)]) == 2
    assert "exists: choose another file" in capsys.readouterr().err


def test_check(capsys: pytest.CaptureFixture) -> None:
    assert main(["check", "animate-14b/lora", "--num_processes", "8"]) == 0
    assert "no problems found" in capsys.readouterr().out
    assert main(["check", "animate-14b/lora", "--num_processes", "6", "--parallel.ulysses", "3"]) == 2
    assert "parallel.ulysses=3 does not divide num_heads=40" in capsys.readouterr().err
    assert main(["check", "nothing"]) == 2
    assert capsys.readouterr().err.startswith("error: recipe 'nothing' is neither a file nor a shipped recipe")


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["export", str(tmp_path)]) == 2
    assert "holds no complete checkpoint" in capsys.readouterr().err
    (tmp_path / "file").write_text("mine")
    assert main(["init-tiny", "animate-14b", str(tmp_path)]) == 2
    assert (tmp_path / "file").read_text() == "mine"
    assert main(["init-tiny", "animate-14c", str(tmp_path / "new")]) == 2
    assert "did you mean animate-14b?" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        main(["recipes", "list", "more=1"])
    assert caught.value.code == 2


def test_listing_recipes_loads_no_torch() -> None:
    code = (
        "import sys; from wan_accel.cli import main; main(['recipes', 'list']); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'diffsynth', 'deepspeed')))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
