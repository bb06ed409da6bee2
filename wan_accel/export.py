"""Leave a run: a LoRA or full weights in the layouts that other tools read, loaded back before it is called done."""

import json
import logging
import shutil
from collections import defaultdict
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from wan_accel.checkpoint import Manifest, last_checkpoint, read_manifest, read_trained
from wan_accel.models.loading import MOTION_ENCODER, CheckpointReader, dit_folder
from wan_accel.models.variants import get_variant

logger = logging.getLogger(__name__)

# Layouts by method. Further LoRA layouts (comfyui, diffusers, peft) are not written yet.
LAYOUTS = {"lora": ("diffsynth",), "full": ("original",)}
INDEX_NAME = "diffusion_pytorch_model.safetensors.index.json"


def export(
    path: Path, *, layout: str | None = None, output: Path | None = None, dtype: torch.dtype | None = None
) -> Path:
    """Export a checkpoint, or the newest one of a run.

    Args:
        path: a run's output_dir or one of its checkpoint folders.
        layout: `diffsynth` for a LoRA (one safetensors file), `original` for full weights (a checkpoint folder).
        output: file or folder to write; `<run>/export/...` by default. An existing one is not overwritten.
        dtype: of the written tensors; as trained by default.

    Returns:
        What was written.

    Raises:
        ValueError: no complete checkpoint, a layout that does not fit the method, or an output that exists.
        RuntimeError: the written tensors, read back by the tool they are meant for, differ from ours.
    """
    checkpoint = path if (path / "manifest.json").is_file() else last_checkpoint(path)
    if checkpoint is None:
        raise ValueError(f"{path} holds no complete checkpoint: give a run's output_dir or a checkpoint-N folder")
    manifest = read_manifest(checkpoint)
    layout = layout or LAYOUTS[manifest.method][0]
    if layout not in LAYOUTS[manifest.method]:
        raise ValueError(
            f"layout {layout!r} does not fit a {manifest.method} checkpoint: use {', '.join(LAYOUTS[manifest.method])}"
        )
    output = output or default_output(checkpoint, manifest)
    if output.exists():
        raise ValueError(f"{output} exists: remove it or choose another --output")
    output.parent.mkdir(parents=True, exist_ok=True)
    trained = read_trained(checkpoint)
    if manifest.method == "lora":
        return _export_lora(trained, manifest, output, dtype)
    return _export_full(trained, manifest, output, dtype)


def default_output(checkpoint: Path, manifest: Manifest) -> Path:
    """`<run>/export/<variant>[-<expert>]-step<N>-lora.safetensors`, or a folder for full weights."""
    expert = "" if manifest.expert == "default" else f"-{manifest.expert}"
    stem = f"{manifest.variant}{expert}-step{manifest.step}"
    name = f"{stem}-lora.safetensors" if manifest.method == "lora" else stem
    return checkpoint.parent / "export" / name


def metadata(manifest: Manifest) -> dict[str, str]:
    """What an exported file says of itself."""
    fields = {
        "format": "pt",
        "variant": manifest.variant,
        "expert": manifest.expert,
        "base": manifest.base,
        "step": str(manifest.step),
        "made_by": "wan-accel",
    }
    if manifest.lora is not None:
        fields |= {"rank": str(manifest.lora["r"]), "alpha": str(manifest.lora["lora_alpha"])}
    return fields


def _export_lora(trained: dict[str, Tensor], manifest: Manifest, output: Path, dtype: torch.dtype | None) -> Path:
    """Original module names with `.lora_A.default.weight`; alpha / r is folded into B, as the layout stores none."""
    assert manifest.lora is not None
    scale = manifest.lora["lora_alpha"] / manifest.lora["r"]
    state = {
        name: (tensor * scale if ".lora_B." in name else tensor).to(dtype or tensor.dtype).contiguous()
        for name, tensor in trained.items()
    }
    temporary = output.with_name(output.name + ".tmp")
    save_file(state, temporary, metadata=metadata(manifest))
    count = verify_diffsynth_lora(temporary, manifest)
    temporary.rename(output)
    logger.info("%s: %d tensors, all fused by diffsynth's loader with the same result", output, count)
    return output


def lora_deltas(state: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Pair a diffsynth-layout LoRA's tensors: weight name of the base -> (lora_A (r, in), lora_B (out, r)).

    Raises:
        ValueError: a tensor without its partner, or one that is not of a LoRA.
    """
    pairs: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in state.items():
        stem, separator, rest = name.removeprefix("diffusion_model.").partition(".lora_")
        if not separator:
            raise ValueError(f"tensor {name} is not part of a LoRA: expected names with .lora_A. and .lora_B.")
        pairs[f"{stem}.weight"][rest[0]] = tensor
    lonely = [name for name, pair in pairs.items() if set(pair) != {"A", "B"}]
    if lonely:
        raise ValueError(f"{len(lonely)} layers have only one of lora_A and lora_B, e.g. {lonely[0]}")
    return {name: (pair["A"], pair["B"]) for name, pair in pairs.items()}


def verify_diffsynth_lora(path: Path, manifest: Manifest) -> int:
    """Let diffsynth's own loader fuse the file into the base weights, block by block, and compare with ours.

    Its loader skips names that it does not know without an error, so the fused weights are compared, not counted.

    Returns:
        The number of tensors fused.

    Raises:
        RuntimeError: a weight comes out different.
    """
    from diffsynth.utils.lora.general import GeneralLoRALoader

    state = load_file(path)
    deltas = lora_deltas(state)
    reader = CheckpointReader(dit_folder(Path(manifest.base), get_variant(manifest.variant), manifest.expert))
    blocks: dict[str, list[str]] = defaultdict(list)
    for name in deltas:
        blocks[".".join(name.split(".")[:2])].append(name)
    for names in blocks.values():
        skeleton = _skeleton({name: reader.read(name).float() for name in names})
        part = {key: value for key, value in state.items() if _weight_of(key) in names}
        GeneralLoRALoader(device="cpu", torch_dtype=torch.float32).fuse_lora_to_base_model(skeleton, part, alpha=1.0)
        for name in names:
            down, up = deltas[name]
            expected = reader.read(name).float() + up.float() @ down.float()
            if not torch.allclose(skeleton.get_parameter(name), expected, rtol=1e-5, atol=1e-6):
                raise RuntimeError(f"{path}: diffsynth's loader does not fuse {name} as trained")
    return len(state)


def _weight_of(name: str) -> str:
    return name.partition(".lora_")[0] + ".weight"


def _skeleton(weights: dict[str, Tensor]) -> nn.Module:
    """A module tree with nothing but linear layers of these names."""
    root = nn.Module()
    for name, weight in weights.items():
        *parents, leaf = name.removesuffix(".weight").split(".")
        parent = root
        for part in parents:
            if part not in dict(parent.named_children()):
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight.data = weight.clone()  # the reader maps files: fusing in place would change what it reads next
        parent.add_module(leaf, linear)
    return root


def _export_full(trained: dict[str, Tensor], manifest: Manifest, output: Path, dtype: torch.dtype | None) -> Path:
    """Trained tensors under their original names, with the base's motion encoder and config.json beside them."""
    from huggingface_hub import save_torch_state_dict

    variant = get_variant(manifest.variant)
    base = dit_folder(Path(manifest.base), variant, manifest.expert)
    reader = CheckpointReader(base)
    untouched = [name for name in reader.shapes if name.startswith(MOTION_ENCODER) and name not in trained]
    state = {name: tensor.to(dtype or tensor.dtype) for name, tensor in trained.items()}
    state |= {name: reader.read(name) for name in untouched}
    folder = output / variant.expert(manifest.expert).folder
    folder.mkdir(parents=True)
    save_torch_state_dict(
        state,
        folder,
        filename_pattern="diffusion_pytorch_model{suffix}.safetensors",
        max_shard_size="10GB",
        metadata=metadata(manifest),
        is_main_process=True,
    )
    if (base / "config.json").is_file():
        shutil.copyfile(base / "config.json", folder / "config.json")
    written = CheckpointReader(folder)
    for name, tensor in state.items():
        if not torch.equal(written.read(name), tensor):
            raise RuntimeError(f"{folder}: {name} does not read back as written")
    logger.info("%s: %d tensors, read back equal", folder, len(state))
    return output


def describe(path: Path) -> str:
    """One line about an exported file or folder for the command line."""
    if path.is_file():
        return f"{path} ({path.stat().st_size / 2**20:.1f} MiB)"
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    files = json.dumps(sorted(str(file.relative_to(path)) for file in path.rglob("*.safetensors")))
    return f"{path} ({size / 2**20:.1f} MiB, {files})"
