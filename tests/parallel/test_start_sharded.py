"""Ranks fill only their slices and hold what one holds: a diffusers DiT, a LoRA fused into it, one to go on from."""

import os
from pathlib import Path

import pytest
import torch
from diffusers_wan import save_repository
from exports import lora_tensors
from ranks import run_ranks
from safetensors.torch import save_file

MODULES = [f"blocks.{block}.{layer}" for block in range(5) for layer in ("self_attn.q", "ffn.2")]


def filled(folder: str) -> dict[str, torch.Tensor]:
    """Assemble as the launcher says; every parameter whole."""
    from torch.distributed.tensor import DTensor

    from wan_accel.arguments import WanTrainingArguments
    from wan_accel.assemble import Techniques, assemble
    from wan_accel.lora import LoraSettings
    from wan_accel.models.variants import VARIANTS
    from wan_accel.parallel.cpu import enable_fsdp_on_cpu
    from wan_accel.parallel.engine import launched_engine
    from wan_accel.parallel.mesh import ParallelDims
    from wan_accel.recipe.schema import Data, FusedLora, Method, Model, Recipe
    from wan_accel.weights import open_weights

    enable_fsdp_on_cpu()
    backend = "gloo" if "WORLD_SIZE" in os.environ else None
    args = WanTrainingArguments(output_dir=f"{folder}/run", use_cpu=True, ddp_backend=backend)
    recipe = Recipe(
        variant="animate-14b",
        model=Model(checkpoint=folder, fuse_loras=[FusedLora(path=f"{folder}/fused.safetensors", scale=0.5)]),
        method=Method(kind="lora", init_from=f"{folder}/start.safetensors"),
        data=Data(latents="latents"),
    )
    lora = LoraSettings(r=4, lora_alpha=4.0, target_modules=("self_attn.q", "ffn.2"))
    device = args.device  # sets the process group up
    dims = ParallelDims(world_size=args.world_size, ulysses=1)
    model = assemble(
        VARIANTS["animate-14b"],
        open_weights(recipe, "default", lora),
        Techniques(lora=lora),
        engine=launched_engine(),
        dims=dims,
        device=device,
    )
    return {
        name: (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach().clone()
        for name, parameter in model.named_parameters()
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start")
    weights = dict(save_repository(folder, "animate-14b")["default"].named_parameters())
    shapes = {"self_attn.q": weights["blocks.0.attn1.to_q.weight"], "ffn.2": weights["blocks.0.ffn.net.2.weight"]}
    base = {f"{module}.weight": shapes[module.split(".", 2)[2]] for module in MODULES}
    for seed, name in enumerate(("fused", "start")):
        save_file(lora_tensors(base, MODULES, seed), folder / f"{name}.safetensors")
    return folder


def test_two_ranks_hold_what_one_holds(folder: Path) -> None:
    [one] = run_ranks(filled, 1, str(folder), engine="single")
    for state in run_ranks(filled, 2, str(folder), engine="fsdp2"):
        assert state.keys() == one.keys()
        for name, tensor in one.items():
            # B @ A of some rows rounds in another order than of all.
            torch.testing.assert_close(state[name], tensor, rtol=1e-5, atol=1e-6, msg=name)
    assert one["blocks.3.ffn.2.lora_B.default.weight"].any()
