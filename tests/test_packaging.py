"""A wheel holds what an installed copy needs, recipes included."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ["wan_accel", "preprocessing", "recipes", "setup.cfg", "pyproject.toml", "README.md", "LICENSE", "NOTICE"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a copy of the tree: building leaves files behind."""
    copy, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(ROOT / name, copy / name)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(out),
        str(copy),
    ]
    subprocess.run(command, check=True, capture_output=True)
    return next(out.glob("wan_accel-*.whl"))


def test_wheel_holds_code_and_data(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    data = ("wan_accel/tiny_corpus.txt", "preprocessing/quality.yaml", "preprocessing/report.html.jinja")
    more = ("preprocessing/report.css", "preprocessing/report.js", "preprocessing/cli.py", "wan_accel/cache.py")
    for expected in ("wan_accel/py.typed", *data, *more):
        assert expected in names
    for recipe in (ROOT / "recipes").rglob("*.yaml"):
        assert f"wan_accel/recipes/{recipe.relative_to(ROOT / 'recipes')}" in names
    modules = {
        str(path.relative_to(ROOT)) for top in ("wan_accel", "preprocessing") for path in (ROOT / top).rglob("*.py")
    }
    assert modules <= names
    assert not any(name.startswith(("tests/", "demo/", "recipes/")) for name in names)


def test_installed_copy_lists_its_recipes(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = "import wan_accel.cli as cli; print(cli.__file__); cli.main(['recipes', 'list'])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True
    )
    where, *recipes = done.stdout.split()
    assert where.startswith(str(tmp_path))
    assert "animate-14b/lora" in recipes


def test_editable_install_lists_its_recipes(tmp_path: Path) -> None:
    """The test environment is an editable install."""
    code = (
        "from wan_accel.recipe.load import recipes_folder, shipped_recipes; print(recipes_folder(), *shipped_recipes())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    folder, *recipes = done.stdout.split()
    assert Path(folder) == ROOT / "recipes"
    assert "demo/animate_full" in recipes
