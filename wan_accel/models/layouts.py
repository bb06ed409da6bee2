"""Names of a Wan DiT's tensors in the layouts that tools write: original, DiffSynth, diffusers. Torch-free.

The original names are ours. DiffSynth writes them too, bare or behind the name of the module that was trained.
diffusers renames modules, splits the face adapter's joint key-value layer and flattens the motion encoder's biases.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from wan_accel.models.variants import CLIP_FILE, TEXT_ENCODER_FILE

Shape = tuple[int, ...]

# What tools put before the names of a DiT: DiffSynth's pipeline, ComfyUI's whole checkpoints, torch's wrappers.
PREFIXES = (
    "pipe.dit.",
    "pipe.animate_adapter.",
    "model.diffusion_model.",
    "diffusion_model.",
    "dit.",
    "animate_adapter.",
    "model.",
    "module.",
)
# Folders of a diffusers repository. WanPipeline runs `transformer` above the boundary, `transformer_2` below it.
DIFFUSERS_FOLDERS = {"default": "transformer", "high": "transformer", "low": "transformer_2"}
# What a diffusers repository has for an encoder file of the original layout; for any VAE file `vae`.
_ENCODER_FOLDERS = {TEXT_ENCODER_FILE: "text_encoder", CLIP_FILE: "image_encoder"}
TOKENIZER = "tokenizer"
_DIFFUSERS_MARK = "condition_embedder."

# Original module (or parameter) -> diffusers' one; # is the number of a block.
_MODULES = {
    "patch_embedding": "patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    "img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
    "blocks.#.modulation": "blocks.#.scale_shift_table",
    "blocks.#.norm3": "blocks.#.norm2",  # both name norms in the order of their use, which the original's is not
    "blocks.#.ffn.0": "blocks.#.ffn.net.0.proj",
    "blocks.#.ffn.2": "blocks.#.ffn.net.2",
    **{
        f"blocks.#.{ours}.{layer}": f"blocks.#.{theirs}.{name}"
        for ours, theirs in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for layer, name in (
            ("q", "to_q"),
            ("k", "to_k"),
            ("v", "to_v"),
            ("o", "to_out.0"),
            ("norm_q", "norm_q"),
            ("norm_k", "norm_k"),
        )
    },
    "blocks.#.cross_attn.k_img": "blocks.#.attn2.add_k_proj",
    "blocks.#.cross_attn.v_img": "blocks.#.attn2.add_v_proj",
    "blocks.#.cross_attn.norm_k_img": "blocks.#.attn2.norm_added_k",
    "pose_patch_embedding": "pose_patch_embedding",
    "face_encoder.conv1_local.conv": "face_encoder.conv1_local",
    "face_encoder.conv2.conv": "face_encoder.conv2",
    "face_encoder.conv3.conv": "face_encoder.conv3",
    "face_encoder.out_proj": "face_encoder.out_proj",
    "face_encoder.padding_tokens": "face_encoder.padding_tokens",
    "face_adapter.fuser_blocks.#.linear1_q": "face_adapter.#.to_q",
    "face_adapter.fuser_blocks.#.linear2": "face_adapter.#.to_out",
    "face_adapter.fuser_blocks.#.q_norm": "face_adapter.#.norm_q",
    "face_adapter.fuser_blocks.#.k_norm": "face_adapter.#.norm_k",
}
# Original module -> the diffusers modules that hold its rows, in order.
_SPLIT = {"face_adapter.fuser_blocks.#.linear1_kv": ("face_adapter.#.to_k", "face_adapter.#.to_v")}
_PARTS = {ours: (theirs,) for ours, theirs in _MODULES.items()} | _SPLIT
_ORIGINAL = {theirs: (ours, part) for ours, parts in _PARTS.items() for part, theirs in enumerate(parts)}
_NUMBER = re.compile(r"^(blocks|face_adapter\.fuser_blocks|face_adapter)\.(\d+)\.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Where a tensor of the original layout is stored: the rows of `names` joined, seen in `shape`."""

    names: tuple[str, ...]
    shape: Shape


def is_diffusers(checkpoint: Path | Iterable[str]) -> bool:
    """Whether a folder, or the files of a repository by their names, are in the diffusers layout."""
    folder = DIFFUSERS_FOLDERS["default"]
    if isinstance(checkpoint, Path):
        return (checkpoint / folder).is_dir()
    return any(name.startswith(f"{folder}/") for name in checkpoint)


def encoder_folder(file: str) -> str:
    """The folder of a diffusers repository that holds what an encoder file of the original layout does."""
    return _ENCODER_FOLDERS.get(file, "vae")


def diffusers_modules(module: str) -> tuple[str, ...] | None:
    """The diffusers modules of an original one: one, or those among which its rows are split; None if there is none."""
    key, number = _generic(module)
    parts = _PARTS.get(key)
    return None if parts is None else tuple(part.replace("#", number) for part in parts)


def original_module(module: str) -> tuple[str, int] | None:
    """The original module of a diffusers one, and which part of its rows that is; None if there is none."""
    key, number = _generic(module)
    if key not in _ORIGINAL:
        return None
    name, part = _ORIGINAL[key]
    return name.replace("#", number), part


def is_original_module(module: str) -> bool:
    return _generic(module)[0] in _PARTS


def without_prefix(name: str, prefixes: Iterable[str] = PREFIXES) -> str:
    """A name without the first of `prefixes` that it begins with."""
    return next((name[len(prefix) :] for prefix in prefixes if name.startswith(prefix)), name)


def _generic(name: str) -> tuple[str, str]:
    """`blocks.12.ffn.0` -> (`blocks.#.ffn.0`, `12`)."""
    match = _NUMBER.match(name)
    return (f"{match[1]}.#.{name[match.end() :]}", match[2]) if match else (name, "")


def original_sources(shapes: Mapping[str, Shape]) -> dict[str, Source]:
    """Map original names to what a file holds, by the file's names alone.

    Names that no layout has stay as they are, for the comparison with a model to list them.

    Raises:
        ValueError: two stored tensors claim one original name.
    """
    bare: dict[str, str] = {}
    for name in shapes:
        if (short := without_prefix(name)) in bare:
            raise ValueError(f"{name} and {bare[short]} are both {short}: keep one of them")
        bare[short] = name
    if not any(name.startswith(_DIFFUSERS_MARK) for name in bare):
        return {short: Source(names=(name,), shape=shapes[name]) for short, name in bare.items()}
    return _from_diffusers({short: shapes[name] for short, name in bare.items()}, bare)


def _from_diffusers(shapes: Mapping[str, Shape], stored: Mapping[str, str]) -> dict[str, Source]:
    motion = _motion_names(shapes)
    parts: dict[str, dict[int, str]] = defaultdict(dict)
    for name in shapes:
        original, part = motion.get(name) or _original_tensor(name) or (name, 0)
        parts[original][part] = name
    sources = {}
    for original, found in parts.items():
        names = [found[part] for part in sorted(found)]
        if original.endswith((".linear1_kv.weight", ".linear1_kv.bias")) and len(names) < 2:
            original = names[0]  # listed under its own name: its other half is missing
        shape = (sum(shapes[name][0] for name in names), *shapes[names[0]][1:]) if shapes[names[0]] else ()
        if names[0].endswith(".act_fn.bias"):
            shape = (1, shape[0], 1, 1)
        sources[original] = Source(names=tuple(stored[name] for name in names), shape=shape)
    return sources


def _original_tensor(name: str) -> tuple[str, int] | None:
    """A diffusers tensor -> (original tensor, part of its rows)."""
    if (whole := original_module(name)) is not None:
        return whole
    module, _, leaf = name.rpartition(".")
    found = original_module(module)
    return None if found is None else (f"{found[0]}.{leaf}", found[1])


def _motion_names(shapes: Mapping[str, Shape]) -> dict[str, tuple[str, int]]:
    """Animate's motion encoder in diffusers names -> original ones; its last convolution is numbered by the others."""
    pattern = re.compile(r"^motion_encoder\.res_blocks\.(\d+)\.conv1\.weight$")
    numbers = [int(match[1]) for name in shapes if (match := pattern.match(name))]
    if not numbers:
        return {}
    convs = "motion_encoder.enc.net_app.convs"
    names = {
        "motion_encoder.motion_synthesis_weight": "motion_encoder.dec.direction.weight",
        "motion_encoder.conv_in.weight": f"{convs}.0.0.weight",
        "motion_encoder.conv_in.act_fn.bias": f"{convs}.0.1.bias",
        "motion_encoder.conv_out.weight": f"{convs}.{max(numbers) + 2}.weight",
    }
    for number in numbers:
        theirs, ours = f"motion_encoder.res_blocks.{number}", f"{convs}.{number + 1}"
        names |= {
            f"{theirs}.conv1.weight": f"{ours}.conv1.0.weight",
            f"{theirs}.conv1.act_fn.bias": f"{ours}.conv1.1.bias",
            f"{theirs}.conv2.weight": f"{ours}.conv2.1.weight",
            f"{theirs}.conv2.act_fn.bias": f"{ours}.conv2.2.bias",
            f"{theirs}.conv_skip.weight": f"{ours}.skip.1.weight",
        }
    linear = "motion_encoder.motion_network."
    names |= {name: f"motion_encoder.enc.fc.{name[len(linear) :]}" for name in shapes if name.startswith(linear)}
    return {theirs: (ours, 0) for theirs, ours in names.items()}
