"""The encoders of a diffusers repository under the names of Wan's own files: VAE, umT5, CLIP's vision tower."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from wan_accel.models.layouts import encoder_folder
from wan_accel.models.reader import CheckpointReader
from wan_accel.models.variants import CLIP_FILE, TEXT_ENCODER_FILE

_Rename = Callable[[str], str]
_Rules = tuple[tuple[str, str], ...]

_VAE_RULES: _Rules = (
    (r"^quant_conv\.", "conv1."),
    (r"^post_quant_conv\.", "conv2."),
    (r"^(encoder|decoder)\.conv_in\.", r"\1.conv1."),
    (r"^(encoder|decoder)\.norm_out\.", r"\1.head.0."),
    (r"^(encoder|decoder)\.conv_out\.", r"\1.head.2."),
    (r"\.mid_block\.attentions\.0\.", ".middle.1."),
    (r"\.mid_block\.resnets\.0\.", ".middle.0."),
    (r"\.mid_block\.resnets\.1\.", ".middle.2."),
    (r"\.(conv_shortcut)\.", ".shortcut."),
    (r"\.norm1\.", ".residual.0."),
    (r"(?<!coder)\.conv1\.", ".residual.2."),
    (r"\.norm2\.", ".residual.3."),
    (r"\.conv2\.", ".residual.6."),
)
_TEXT_RULES: _Rules = (
    (r"^(shared|encoder\.embed_tokens)\.", "token_embedding."),
    (r"^encoder\.final_layer_norm\.", "norm."),
    (r"^encoder\.block\.(\d+)\.", r"blocks.\1."),
    (r"\.layer\.0\.SelfAttention\.relative_attention_bias\.", ".pos_embedding.embedding."),
    (r"\.layer\.0\.SelfAttention\.", ".attn."),
    (r"\.layer\.0\.layer_norm\.", ".norm1."),
    (r"\.layer\.1\.layer_norm\.", ".norm2."),
    (r"\.layer\.1\.DenseReluDense\.wi_0\.", ".ffn.gate.0."),
    (r"\.layer\.1\.DenseReluDense\.wi_1\.", ".ffn.fc1."),
    (r"\.layer\.1\.DenseReluDense\.wo\.", ".ffn.fc2."),
)
_CLIP_RULES: _Rules = (
    (r"^vision_model\.", ""),
    (r"^embeddings\.class_embedding$", "cls_embedding"),
    (r"^embeddings\.patch_embedding\.", "patch_embedding."),
    (r"^embeddings\.position_embedding\.weight$", "pos_embedding"),
    (r"^pre_layrnorm\.", "pre_norm."),
    (r"^post_layernorm\.", "post_norm."),
    (r"^encoder\.layers\.(\d+)\.", r"transformer.\1."),
    (r"\.layer_norm([12])\.", r".norm\1."),
    (r"\.self_attn\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.fc1\.", ".mlp.0."),
    (r"\.mlp\.fc2\.", ".mlp.2."),
)


def read_diffusers_encoder(folder: Path) -> dict[str, Tensor]:
    """Read an encoder of a diffusers repository under the names of Wan's own file.

    Names that are not known stay as they are, for the comparison with the model to list them.

    Raises:
        CheckpointError: the folder has no safetensors files, or a damaged one.
    """
    reader = CheckpointReader(folder)
    state = {name: reader.read(name) for name in reader.shapes}
    renamers = {encoder_folder(TEXT_ENCODER_FILE): _text_encoder, encoder_folder(CLIP_FILE): _clip}
    return renamers.get(folder.name, _vae)(state)


def _renamed(name: str, rules: _Rules) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def _text_encoder(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {_renamed(name, _TEXT_RULES): tensor for name, tensor in state.items()}


def _vae(state: dict[str, Tensor]) -> dict[str, Tensor]:
    stages = _vae_stages(state)
    return {_renamed(stages(name), _VAE_RULES): tensor for name, tensor in state.items()}


def _vae_stages(names: Iterable[str]) -> _Rename:
    """How blocks are numbered: Wan2.1 counts through all stages, Wan2.2 in each; a stage ends with its resampling."""
    counts: dict[str, int] = defaultdict(int)
    pattern = re.compile(r"^(encoder\.down|decoder\.up)_blocks\.(\d+)\.resnets\.(\d+)\.")
    for name in names:
        if match := pattern.match(name):
            key = f"{match[1]}.{match[2]}"
            counts[key] = max(counts[key], int(match[3]) + 1)
    is_nested = "encoder.down.0" in counts  # only Wan2.2's encoder has stages
    per_stage = max(counts.values(), default=0) + 1
    block = re.compile(
        r"^(encoder\.down|decoder\.up)_blocks\.(\d+)\.(?:(resnets)\.(\d+)|(?:down|up)sampler(?:s\.0)?)\."
    )

    def rename(name: str) -> str:
        match = block.match(name)
        if match is None:
            return name.replace("encoder.down_blocks.", "encoder.downsamples.", 1)
        side, stage = match[1], int(match[2])
        index = int(match[4]) if match[3] else counts[f"{side}.{stage}"]
        place = f"{stage}.{side.split('.')[1]}samples.{index}" if is_nested else str(stage * per_stage + index)
        return f"{side}samples.{place}.{name[match.end() :]}"

    return rename


def _clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """CLIP with joint queries, keys and values, under `visual.` as in Wan's file, which holds a text tower too."""
    joined: dict[str, dict[str, Tensor]] = defaultdict(dict)
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.endswith("position_ids"):
            continue  # a constant of older files
        short = _renamed(name, _CLIP_RULES)
        if match := re.fullmatch(r"(.+)\.self_attn\.([qkv])_proj\.(weight|bias)", short):
            joined[f"{match[1]}.attn.to_qkv.{match[3]}"][match[2]] = tensor
        elif short in ("cls_embedding", "pos_embedding"):
            renamed[short] = tensor.reshape(1, -1, tensor.shape[-1])
        elif short == "visual_projection.weight":
            renamed["head"] = tensor.T
        else:
            renamed[short] = tensor
    for name, parts in joined.items():
        renamed[name] = torch.cat([parts[key] for key in sorted(parts, key="qkv".index)])
    if "head" not in renamed and "pos_embedding" in renamed:
        # The projection behind the last block, which nothing here runs, is not in a CLIPVisionModel.
        renamed["head"] = renamed["pos_embedding"].new_zeros(renamed["pos_embedding"].shape[-1], 1)
    return {f"visual.{name}": tensor for name, tensor in renamed.items()}
