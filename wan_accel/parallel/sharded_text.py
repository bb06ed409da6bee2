"""umT5 split over all ranks by `fully_shard`: a rank holds its share and gathers one block at a time."""

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from wan_accel.models.checkpoint_files import read_encoder
from wan_accel.models.encoder_sizes import build_text_encoder
from wan_accel.models.encoders import TextEncoder, build_skeleton, load_tokenizer
from wan_accel.models.loading import compare_tensors, local_rows
from wan_accel.models.variants import TEXT_ENCODER_FILE


class ShardedTextEncoder(TextEncoder):
    """umT5 over all ranks: `encode` is collective, every rank calls it as often as the others, with texts of its own.

    Its gathers run over the group of all ranks, a block at a time; there is no backward.
    """

    def encode(self, texts: list[str]) -> list[Tensor]:
        """See `TextEncoder.encode`. The gathered parameters are freed when it returns."""
        states = super().encode(texts)
        assert isinstance(self.model, FSDPModule)
        self.model.reshard()  # the root stays gathered after a forward without a backward
        return states


def load_sharded_text_encoder(
    checkpoint: Path, *, torch_dtype: torch.dtype = torch.bfloat16, device: torch.device | str = "cpu"
) -> TextEncoder:
    """Load umT5 split over all ranks; each reads its own slices of the file and nothing else. Collective.

    Raises:
        CheckpointError: a file is missing or damaged, or its tensors are not those of umT5.
    """
    tokenizer = load_tokenizer(checkpoint)
    path = checkpoint / TEXT_ENCODER_FILE
    state = read_encoder(path)
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    model = build_skeleton(path, build_text_encoder, shapes).to(torch_dtype).eval().requires_grad_(False)
    compare_tensors({name: tuple(p.shape) for name, p in model.named_parameters()}, shapes, path)
    mesh = init_device_mesh(torch.device(device).type, (dist.get_world_size(),))
    # The embedding is a third of all parameters: as part of the root it would stay gathered through a forward.
    for unit in (model.token_embedding, *model.blocks):
        fully_shard(unit, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh)
    model.to_empty(device=device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            assert isinstance(parameter.data, DTensor)
            local = parameter.data.to_local()
            local.copy_(state[name][local_rows(parameter.data)].reshape(local.shape))
    return ShardedTextEncoder(model, tokenizer)
