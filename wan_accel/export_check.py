"""Load exported LoRAs back with the tools that they are meant for, and compare what those would compute."""

import importlib.util
from collections import defaultdict
from collections.abc import Mapping
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from wan_accel.export_lora import Pairs
from wan_accel.lora_files import PEFT_FILE, read_lora
from wan_accel.models.diffusers_size import diffusers_arguments
from wan_accel.models.errors import ReadBackError
from wan_accel.models.layouts import diffusers_modules
from wan_accel.models.reader import CheckpointReader
from wan_accel.models.variants import Variant


def read_back(path: Path, layout: str, pairs: Pairs, base: CheckpointReader, variant: Variant) -> str:
    """Load an exported LoRA with the tool of its layout, and with our own reader.

    Args:
        path: the file, or peft's folder.
        layout: of `export_lora.LORA_LAYOUTS`.
        pairs: what was written, scale folded in.
        base: the weights that the LoRA is for.
        variant: of the model.

    Returns:
        Which tools loaded it, and which could not be asked.

    Raises:
        ReadBackError: a tool would compute something else.
    """
    _compare_ours(path, pairs)
    return {
        "diffsynth": lambda: _by_diffsynth(path, pairs, base),
        "comfyui": lambda: (
            f"{_by_diffsynth(path, pairs, base)}; ComfyUI is no package that can be asked: the names are its model's"
        ),
        "diffusers": lambda: _by_diffusers(path, pairs, base, variant),
        "peft": lambda: _by_peft(path, pairs),
    }[layout]()


def _compare_ours(path: Path, pairs: Pairs) -> None:
    deltas = read_lora(path).deltas()
    if deltas.keys() != {f"{name}.weight" for name in pairs}:
        raise ReadBackError(f"{path}: the layers that are read back are not those that were written")
    for name, pair in pairs.items():
        _compare_update(path, "wan-accel", name, deltas[f"{name}.weight"], pair)


def _compare_update(
    path: Path, tool: str, name: str, found: tuple[Tensor, Tensor], pair: tuple[Tensor, Tensor]
) -> None:
    """Compare the factors; the scale may stand in either of them, and rounds in the dtype that was written."""
    tolerance = 1e-5 if pair[1].dtype == torch.float32 else 2e-2
    for half, ours in zip(found, pair):
        if half.shape != ours.shape or not torch.allclose(
            half.float(), ours.float(), rtol=tolerance, atol=tolerance * float(ours.abs().max())
        ):
            raise ReadBackError(f"{path}: {tool} does not load {name} as trained")


def _by_diffsynth(path: Path, pairs: Pairs, base: CheckpointReader) -> str:
    """Let diffsynth's loader fuse the file into the base weights, block by block, and compare with ours.

    Its loader skips names that it does not know without an error, so the fused weights are compared, not counted.
    """
    from diffsynth.utils.lora.general import GeneralLoRALoader

    state = load_file(path)
    blocks: dict[str, list[str]] = defaultdict(list)
    for name in pairs:
        blocks[".".join(name.split(".")[:2])].append(name)
    loader = GeneralLoRALoader(device="cpu", torch_dtype=torch.float32)
    for names in blocks.values():
        # Copies: the reader maps files, and fusing in place would change what it reads next.
        skeleton = _skeleton({name: base.read(f"{name}.weight").float().clone() for name in names})
        part = {key: value for key, value in state.items() if _module_of(key) in names}
        with redirect_stdout(StringIO()):  # it prints a line for every block
            loader.fuse_lora_to_base_model(skeleton, part, alpha=1.0)
        for name in names:
            down, up = pairs[name]
            expected = base.read(f"{name}.weight").float() + up.float() @ down.float()
            if not torch.allclose(skeleton.get_parameter(f"{name}.weight"), expected, rtol=1e-5, atol=1e-6):
                raise ReadBackError(f"{path}: diffsynth's loader does not fuse {name} as trained")
    return "diffsynth"


def _module_of(name: str) -> str:
    return name.removeprefix("diffusion_model.").partition(".lora_")[0]


def _weightless(shape: tuple[int, ...]) -> nn.Parameter:
    """A parameter of any size that takes the memory of one element (peft moves adapters to its base's device)."""
    return nn.Parameter(torch.zeros(()).expand(shape), requires_grad=False)


def _skeleton(weights: Mapping[str, Tensor]) -> nn.Module:
    """A module tree with nothing but linear layers of these names, which share the memory of `weights`."""
    root = nn.Module()
    for name, weight in weights.items():
        *parents, leaf = name.split(".")
        parent = root
        for part in parents:
            if part not in dict(parent.named_children()):
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        parent.add_module(leaf, linear)
    return root


def _by_diffusers(path: Path, pairs: Pairs, base: CheckpointReader, variant: Variant) -> str:
    """Let diffusers' pipeline loader put the file on its own transformer, whose weights take no memory."""
    if importlib.util.find_spec("diffusers") is None:
        return "wan-accel alone: diffusers is not installed here, so it was not asked"
    import diffusers
    from diffusers.loaders.lora_pipeline import WanLoraLoaderMixin

    name, arguments = diffusers_arguments(variant, base)
    if not hasattr(diffusers, name):
        return f"wan-accel alone: diffusers {diffusers.__version__} has no {name}, so it was not asked"
    with torch.device("meta"):
        transformer = getattr(diffusers, name)(**arguments)
    for module in transformer.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[key] = _weightless(tuple(parameter.shape))
    state, metadata = WanLoraLoaderMixin.lora_state_dict(str(path), return_lora_metadata=True)
    WanLoraLoaderMixin.load_lora_into_transformer(state, transformer, adapter_name="export", metadata=metadata)
    for module, (down, up) in pairs.items():
        names = diffusers_modules(module) or ()
        for part, rows in zip(names, up.chunk(len(names))):
            found = _adapter(transformer, part, "export")
            if found is None:
                raise ReadBackError(f"{path}: diffusers {diffusers.__version__} does not load {part}")
            _compare_update(path, "diffusers", part, found, (down, rows))
    return f"diffusers {diffusers.__version__}"


def _adapter(model: nn.Module, module: str, adapter: str) -> tuple[Tensor, Tensor] | None:
    """The factors of a layer that peft wrapped, its scaling folded into the second; None where it did not."""
    try:
        layer: Any = model.get_submodule(module)
    except AttributeError:
        return None
    if adapter not in getattr(layer, "lora_A", {}):
        return None
    return layer.lora_A[adapter].weight.detach(), layer.lora_B[adapter].weight.detach() * layer.scaling[adapter]


def _by_peft(folder: Path, pairs: Pairs) -> str:
    """Let peft load the folder on a tree of linear layers with the original names."""
    import peft

    weights = {name: _weightless((up.shape[0], down.shape[1])) for name, (down, up) in pairs.items()}
    model = peft.PeftModel.from_pretrained(_skeleton(weights), str(folder))
    for name, pair in pairs.items():
        found = _adapter(model.get_base_model(), name, "default")
        if found is None:
            raise ReadBackError(f"{folder / PEFT_FILE}: peft does not load {name}")
        _compare_update(folder, "peft", name, found, pair)
    return f"peft {peft.__version__}"
