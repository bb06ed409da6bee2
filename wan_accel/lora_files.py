"""Read a LoRA file of any tool: DiffSynth, ComfyUI, diffusers or peft, decided by its tensor names.

Layouts (X is an original module name such as `blocks.0.self_attn.q`, Y its diffusers name):
    diffsynth   X.lora_A.default.weight, X.lora_B.default.weight
    comfyui     diffusion_model.X.lora_A.weight (or lora_down / lora_up, with X.alpha)
    diffusers   transformer.Y.lora_A.weight, rank and alpha in the file's metadata where it has any; a file of both
                experts has transformer.Y of the high-noise and transformer_2.Y of the low-noise one
    peft        adapter_model.safetensors with base_model.model.X.lora_A.weight; adapter_config.json with r, lora_alpha
"""

import json
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wan_accel.models.errors import CheckpointError
from wan_accel.models.layouts import (
    DIFFUSERS_FOLDERS,
    PREFIXES,
    is_original_module,
    original_module,
    without_prefix,
)
from wan_accel.models.reader import file_metadata, listed, open_safetensors

PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
# Key of diffusers' LoRA settings in a file's metadata (diffusers/loaders/lora_base.py, LORA_ADAPTER_METADATA_KEY).
DIFFUSERS_METADATA = "lora_adapter_metadata"
_SECOND = f"{DIFFUSERS_FOLDERS['low']}."
_LORA_PREFIXES = ("base_model.model.", "transformer_2.", "transformer.", *PREFIXES)
_KEY = re.compile(
    r"(?P<module>.+?)\."
    r"(?:(?P<pair>lora_A|lora_B|lora_down|lora_up)(?:\.\w+)?\.weight|(?P<lone>alpha|diff|diff_b))"
)
_KINDS = {"lora_down": "lora_A", "lora_up": "lora_B"}
_LEAVES = {"diff": "weight", "diff_b": "bias"}
# Settings of peft that change what an adapter computes and that are not read; their neutral values.
_PEFT_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "use_rslora": (False, None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "lora_bias": (False, None),
    "bias": ("none", None),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraLayer:
    """One layer's update: scale * up @ down, with down (r, in) and up (out, r)."""

    down: Tensor
    up: Tensor
    scale: float = 1.0

    @property
    def rank(self) -> int:
        return self.down.shape[0]


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraFile:
    """A LoRA by original module names.

    differences: tensor name -> what is added to it as it is (some distillation LoRAs have biases so).
    metadata: what the file says of itself.
    """

    path: Path
    layers: dict[str, LoraLayer]
    differences: dict[str, Tensor] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)

    def deltas(self) -> dict[str, tuple[Tensor, Tensor]]:
        """What the file adds to the base's weights, see `deltas`."""
        return deltas(self.layers)


def find_lora(path: Path, expert: str = "default") -> Path:
    """The file, or the folder in peft's layout, that `path` means for an expert.

    Raises:
        CheckpointError: nothing is there, or several files of which none is named after the expert.
    """
    if path.is_file() or (path / PEFT_CONFIG).is_file():
        return path
    if not path.is_dir():
        raise CheckpointError(f"LoRA {path} does not exist: give a .safetensors file or a folder of peft")
    found = _loras_in(path)
    if len(found) > 1:
        found = [entry for entry in found if f"{expert}_noise" in entry.name]
    if len(found) != 1:
        raise CheckpointError(
            f"{path} holds no LoRA of the expert {expert!r} alone: give one .safetensors file, or a pair whose names "
            "have high_noise and low_noise"
        )
    return find_lora(found[0], expert)


def read_lora(path: Path, expert: str = "default") -> LoraFile:
    """Read a LoRA file, or a folder in peft's layout; of a file with both experts of a pair the one that is asked for.

    Raises:
        CheckpointError: it is damaged, of the other expert, or not a LoRA in a layout that is known; every tensor that
            is not understood.
    """
    if (path / PEFT_CONFIG).is_file():
        return _read_peft(path)
    metadata, tensors = file_metadata(path), _tensors(path, expert)
    prefix = _SECOND if next(iter(tensors), "").startswith(_SECOND) else f"{DIFFUSERS_FOLDERS['high']}."
    stored = json.loads(metadata.get(DIFFUSERS_METADATA, "{}"))
    settings = {key.removeprefix(prefix): value for key, value in stored.items() if key.startswith(prefix)}
    _refuse_settings(path, settings)
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    layers, differences = lora_layers(tensors, path, scale=alpha / rank if rank and alpha else 1.0)
    return LoraFile(path=path, layers=layers, differences=differences, metadata=metadata)


def holds_pair(path: Path) -> bool:
    """Whether one path has a LoRA for each expert: a file with both, a folder of such a file or of several."""
    if path.is_dir():
        found = [] if (path / PEFT_CONFIG).is_file() else _loras_in(path)
        return len(found) > 1 or (len(found) == 1 and holds_pair(found[0]))
    seconds = [name.startswith(_SECOND) for name in open_safetensors(path).keys()]  # noqa: SIM118
    return any(seconds) and not all(seconds)


def _loras_in(folder: Path) -> list[Path]:
    """Files and peft's folders in a folder. Not every folder: `hf download` leaves its .cache beside the files."""
    entries = sorted(folder.iterdir())
    return [entry for entry in entries if entry.suffix == ".safetensors" or (entry / PEFT_CONFIG).is_file()]


def _read_peft(folder: Path) -> LoraFile:
    config = json.loads((folder / PEFT_CONFIG).read_text())
    _refuse_settings(folder, config)
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not rank or not alpha:
        raise CheckpointError(f"{folder / PEFT_CONFIG} has no r and lora_alpha: it is not the config of a LoRA")
    if not (folder / PEFT_FILE).is_file():
        raise CheckpointError(f"{folder} has {PEFT_CONFIG} but no {PEFT_FILE}: copy the whole folder")
    layers, differences = lora_layers(_tensors(folder / PEFT_FILE, "default"), folder, scale=alpha / rank)
    metadata = {"rank": str(rank), "alpha": str(alpha), **file_metadata(folder / PEFT_FILE)}
    return LoraFile(path=folder, layers=layers, differences=differences, metadata=metadata)


def _tensors(path: Path, expert: str) -> dict[str, Tensor]:
    """A file's tensors for an expert; a file of other weights, which may be large, is refused by its names."""
    handle = open_safetensors(path)
    names = list(handle.keys())
    if names and not any(_KEY.fullmatch(name) for name in names):
        raise CheckpointError(
            f"{path} is no LoRA: none of its {len(names)} tensors is named like one, e.g. {names[0]}. Full weights are "
            "given as model.checkpoint, or as method.init_from with method.kind=full"
        )
    return {name: handle.get_tensor(name) for name in _names_of(expert, names, path)}


def _names_of(expert: str, names: list[str], path: Path) -> list[str]:
    """The names that are an expert's. Only a low-noise one's say so: tools write the others as `transformer.` too."""
    second = [name for name in names if name.startswith(_SECOND)]
    if not second or expert == "low":
        return second or names
    first = [name for name in names if name not in set(second)]
    if first and expert == "high":
        return first
    held = "both experts of a pair" if first else "the low-noise expert of a pair"
    asked = "the high-noise one is" if expert == "high" else "a model without experts is"
    raise CheckpointError(
        f"{path} holds {held} ({len(first)} tensors of transformer, {len(second)} of transformer_2) and {asked} asked "
        "for: give a LoRA that is for it, or set the variant and model.expert of this one"
    )


def _refuse_settings(path: Path, settings: Mapping[str, Any]) -> None:
    wrong = [f"{key}={settings[key]}" for key, neutral in _PEFT_NEUTRAL.items() if settings.get(key) not in neutral]
    if wrong:
        raise CheckpointError(f"{path} is a LoRA with {', '.join(wrong)}, which is not read: merge it with peft first")


def lora_layers(
    state: Mapping[str, Tensor], path: Path, *, scale: float = 1.0
) -> tuple[dict[str, LoraLayer], dict[str, Tensor]]:
    """Sort a file's tensors into layers and differences, under original names.

    Args:
        state: the tensors as they are named in the file.
        path: for messages.
        scale: alpha / r where the file has no alpha of its own.

    Raises:
        CheckpointError: no layer, or tensors that are not understood, all at once.
    """
    found: dict[str, dict[str, Tensor]] = defaultdict(dict)
    problems = []
    for name, tensor in state.items():
        match = _KEY.fullmatch(name)
        if match is None:
            problems.append(f"unknown {name} {tuple(tensor.shape)}")
            continue
        kind = match["pair"] or match["lone"]
        found[_bare(match["module"])][_KINDS.get(kind, kind)] = tensor
    parts: dict[str, dict[int, LoraLayer]] = defaultdict(dict)
    differences: dict[str, Tensor] = {}
    for module, pieces in found.items():
        original, part = _original(module)
        differences |= {f"{original}.{leaf}": pieces[kind] for kind, leaf in _LEAVES.items() if kind in pieces}
        if "lora_A" in pieces and "lora_B" in pieces:
            alpha = pieces.get("alpha")
            factor = scale if alpha is None else float(alpha) / pieces["lora_A"].shape[0]
            parts[original][part] = LoraLayer(down=pieces["lora_A"], up=pieces["lora_B"], scale=factor)
        elif not pieces.keys() & _LEAVES.keys():
            problems.append(f"{module} has only {' and '.join(pieces)}")
    if problems or not (parts or differences):
        raise CheckpointError(
            f"{path} is not a LoRA in a layout that is read (diffsynth, comfyui, diffusers, peft): "
            f"{len(problems)} of its {len(state)} tensors are not understood\n  {listed(problems)}"
        )
    layers = {module: _join([halves[part] for part in sorted(halves)]) for module, halves in parts.items()}
    return layers, differences


def _bare(module: str) -> str:
    """A module's name without the names of what it was wrapped in."""
    short = without_prefix(module, _LORA_PREFIXES)
    return short if short == module else _bare(short)


def _original(module: str) -> tuple[str, int]:
    return (module, 0) if is_original_module(module) else original_module(module) or (module, 0)


def _join(parts: list[LoraLayer]) -> LoraLayer:
    """The adapter of a layer that diffusers splits by rows: one with their rows, or of the sum of their ranks."""
    if len(parts) == 1:
        return parts[0]
    first, second = parts
    if torch.equal(first.down, second.down) and first.scale == second.scale:
        return LoraLayer(down=first.down, up=torch.cat([first.up, second.up]), scale=first.scale)
    up = torch.block_diag(first.up * first.scale, second.up * second.scale)
    return LoraLayer(down=torch.cat([first.down, second.down]), up=up)


def deltas(layers: Mapping[str, LoraLayer]) -> dict[str, tuple[Tensor, Tensor]]:
    """Weight name of the base -> (lora_A (r, in), lora_B (out, r) fp32 with the scale folded in)."""
    return {f"{name}.weight": (layer.down, layer.up.float() * layer.scale) for name, layer in layers.items()}
