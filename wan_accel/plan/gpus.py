"""The table of GPUs: what a step's time is predicted from. Torch-free."""

from dataclasses import dataclass, fields
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from wan_accel.flops import peak_tflops

_FILE = "gpus.yaml"


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """A row of gpus.yaml, which explains the columns."""

    name: str
    memory_gib: float
    hbm_gb_s: float
    node_gb_s: float
    network_gb_s: float
    gpus_per_node: int
    products: float
    attention: float
    fp8: float
    eager: float
    link_share: float
    pcie_gb_s: float
    host_gb_s: float
    tflops: float


def read_gpus(path: Path | None = None) -> dict[str, Gpu]:
    """The rows of a file of the user's, where there is one, and those of ours that it does not replace.

    Raises:
        ValueError: the file cannot be read, or a row lacks a column or has an unknown one.
    """
    ours = _read((files("wan_accel.plan") / _FILE).read_text(), _FILE)
    if path is None:
        return ours
    try:
        theirs = _read(path.read_text(), str(path))
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"--gpus {path} cannot be read: {error}") from None
    return {**theirs, **{name: row for name, row in ours.items() if name not in theirs}}


def _read(text: str, name: str) -> dict[str, Gpu]:
    content: Any = yaml.safe_load(text)
    if not isinstance(content, dict) or not isinstance(content.get("gpus"), dict):
        raise ValueError(f"{name}: no table of `gpus`: copy ours ({_FILE} of wan_accel/plan) and edit it")
    defaults = content.get("defaults") or {}
    return {gpu: _row(gpu, {**defaults, **row}, name) for gpu, row in content["gpus"].items()}


def _row(gpu: str, row: dict[str, Any], name: str) -> Gpu:
    row = {"tflops": peak_tflops(gpu), **row}
    wanted = {field.name for field in fields(Gpu)} - {"name"}
    missing = sorted(wanted - {key for key, value in row.items() if value is not None})
    if missing or (unknown := sorted(set(row) - wanted)):
        problem = f"lacks {', '.join(missing)}" if missing else f"has unknown columns {', '.join(unknown)}"
        raise ValueError(f"{name}: {gpu} {problem}: use {', '.join(sorted(wanted))}")
    return Gpu(name=gpu, **row)


def chosen_gpus(gpus: dict[str, Gpu], *, name: str | None, memory_gib: float | None) -> list[Gpu]:
    """The one of a name; or those with about this memory, which is why they are asked about.

    Raises:
        ValueError: there is none of that name.
    """
    if name is None:
        assert memory_gib is not None
        return [gpu for gpu in gpus.values() if abs(gpu.memory_gib - memory_gib) <= 0.1 * memory_gib]
    if name not in gpus:
        raise ValueError(f"--gpu {name} is not in the table: use {', '.join(gpus)}, or add a row with --gpus FILE")
    return [gpus[name]]
