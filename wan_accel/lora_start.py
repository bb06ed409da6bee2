"""The adapter that a run goes on from: a LoRA file at the rank and alpha of the recipe."""

from torch import Tensor

from wan_accel.lora import ADAPTER_NAME, LoraSettings
from wan_accel.lora_files import LoraFile
from wan_accel.models.errors import CheckpointError


def starting_adapter(lora: LoraFile, settings: LoraSettings) -> dict[str, Tensor]:
    """The adapter that a run starts from: names in the model -> fp32 values, at the recipe's rank and alpha.

    An alpha that a file has folded into its tensors is taken out of them again.

    Raises:
        CheckpointError: rank or alpha is not the recipe's, or the file changes more than linear layers.
    """
    if lora.differences:
        raise CheckpointError(
            f"method.init_from={lora.path} changes {len(lora.differences)} tensors besides its LoRA layers, e.g. "
            f"{next(iter(lora.differences))}: merge it into the base with model.fuse_loras instead"
        )
    ranks = sorted({layer.rank for layer in lora.layers.values()})
    scales = {layer.scale for layer in lora.layers.values()}
    if len(ranks) > 1 or len(scales) > 1:
        raise CheckpointError(
            f"method.init_from={lora.path} has layers of several ranks or scales ({ranks}): merge it with "
            "model.fuse_loras instead"
        )
    rank, scale = ranks[0], next(iter(scales))
    alpha = float(lora.metadata.get("alpha", scale * rank))
    if rank != settings.r or alpha != settings.lora_alpha:
        raise CheckpointError(
            f"method.init_from={lora.path} has rank {rank} and alpha {alpha:g}, the recipe r={settings.r} and "
            f"lora_alpha={settings.lora_alpha:g}: set method.r={rank} and method.lora_alpha={alpha:g}"
        )
    state = {}
    for name, layer in lora.layers.items():
        state[f"{name}.lora_A.{ADAPTER_NAME}.weight"] = layer.down.float()
        state[f"{name}.lora_B.{ADAPTER_NAME}.weight"] = layer.up.float() * (scale / settings.scale)
    return state
