"""Which package may import which: the dataset on disk is the contract between preprocessing and training."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "deepspeed", "diffsynth", "transformers", "accelerate")
# Modules that are networks of these libraries: imported in functions only, where such a network is asked for.
NETWORKS = {"sam2_video": {"torch"}, "sam2_transformers": {"torch", "transformers"}, "flux": {"torch"}}
CONTRACT = {"wan_accel.data", "wan_accel.data.schema", "wan_accel.data.store", "wan_accel.data.clips"}
# What both sides need, and what must not differ: arithmetic on arrays, the language that chooses clips, what a hub's
# failures are called, the text on contact sheets, lists that are cut short.
SHARED = {
    "wan_accel.data.masks", "wan_accel.data.skeleton", "wan_accel.data.where", "wan_accel.hub", "wan_accel.listing",
    "wan_accel.sheet_text",
}  # fmt: skip


def imported_modules(path: Path) -> set[str]:
    """Every module that a file names in an import, wherever the import stands."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names if node.module == "wan_accel.data"}
    return found


def files_of(package: str) -> list[Path]:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files, package
    return files


@pytest.mark.parametrize("package", ["wan_accel", "recipes"])
def test_training_never_imports_preprocessing(package):
    for path in files_of(package):
        assert not {name for name in imported_modules(path) if name.split(".")[0] == "preprocessing"}, path


def test_preprocessing_imports_only_the_contract():
    for path in files_of("preprocessing"):
        ours = {name for name in imported_modules(path) if name.split(".")[0] == "wan_accel"}
        assert ours <= CONTRACT | SHARED, path


def test_preprocessing_names_no_training_library():
    for path in files_of("preprocessing"):
        heavy = {name.split(".")[0] for name in imported_modules(path)} & set(HEAVY)
        assert heavy <= NETWORKS.get(path.stem, set()), path


def test_importing_preprocessing_loads_no_training_library():
    modules = [f"preprocessing.{p.stem}" for p in (ROOT / "preprocessing").glob("*.py") if p.stem not in NETWORKS]
    code = (
        f"import sys, importlib\nfor name in {modules!r}: importlib.import_module(name)\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
