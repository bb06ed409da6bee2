"""A loop of your own: a Wan denoiser trained with accelerate's FSDP2 or DeepSpeed ZeRO-3, and Ulysses.

    wan-accel init-tiny t2v-1.3b /tmp/tiny          # or a released checkpoint
    accelerate launch --config_file recipes/accelerate/fsdp2.yaml --num_processes 8 \
        examples/accelerate_loop.py --checkpoint /tmp/tiny --ulysses 2
"""

import argparse
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from wan_accel import fsdp2_plugin, inject_ulysses, load_wan, zero3_plugin
from wan_accel.objective import add_noise, per_sample_mse, velocity
from wan_accel.parallel.fsdp import assert_sharded
from wan_accel.parallel.mesh import ParallelDims

VARIANT, BATCH, FRAMES, HEIGHT, WIDTH, CHANNELS = "t2v-1.3b", 4, 3, 8, 12, 16


def batches(steps: int, text_dim: int) -> Iterator[dict[str, torch.Tensor]]:
    """Made-up cached conditions; put your own latents here. Every rank draws the same and takes its share."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        shape = (BATCH, CHANNELS, FRAMES, HEIGHT, WIDTH)
        latents, noise = (torch.randn(shape, generator=generator) for _ in range(2))
        text = torch.randn(BATCH, 7, text_dim, generator=generator)
        yield {"latents": latents, "noise": noise, "text": text, "sigma": torch.rand(BATCH, generator=generator)}


def main(arguments: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--engine", choices=["fsdp2", "zero3"], default="fsdp2")
    parser.add_argument("--ulysses", type=int, default=1)
    parser.add_argument("--steps", type=int, default=4)
    options = parser.parse_args(arguments)

    # Before the Accelerator: with a plugin it shards, and the plugin reads the launcher's config.
    if options.engine == "fsdp2":
        plugins = {"fsdp_plugin": fsdp2_plugin(VARIANT)}
    else:
        plugins = {"deepspeed_plugin": zero3_plugin(VARIANT, max_grad_norm=1.0)}
    # accelerate counts one process where DeepSpeed has no GPU, unless it is told the backend.
    tells_backend = options.engine == "zero3" and not torch.cuda.is_available()
    handlers = [InitProcessGroupKwargs(backend="gloo")] if tells_backend else None
    accelerator = Accelerator(kwargs_handlers=handlers, **plugins)
    dims = ParallelDims(world_size=accelerator.num_processes, ulysses=options.ulysses)
    model = load_wan(VARIANT, options.checkpoint)
    dims.validate(model.num_heads)
    if (group := dims.ulysses_group(accelerator.device.type)) is not None:
        inject_ulysses(model, group)
    text_dim = model.text_embedding[0].in_features
    # AdamW over the whole parameters: `prepare` puts the shards in their place.
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3))

    if options.engine == "fsdp2" and accelerator.num_processes > 1:
        assert_sharded(model)

    # Ranks of a Ulysses group see the same samples, so batches are shared out over data ranks, not by accelerate.
    data_rank, losses = dims.data_rank(accelerator.process_index), []
    for step, batch in enumerate(batches(options.steps, text_dim), start=1):
        share = {name: whole.chunk(dims.num_data_ranks)[data_rank] for name, whole in batch.items()}
        batch = {name: value.to(accelerator.device) for name, value in share.items()}
        noisy = add_noise(batch["latents"], batch["noise"], batch["sigma"])
        predicted = model(noisy, 1000 * batch["sigma"], batch["text"])
        loss = per_sample_mse(predicted, velocity(batch["latents"], batch["noise"])).mean()
        accelerator.backward(loss)  # gradients are averaged over all ranks: no other scaling, Ulysses or not
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.reduce(loss.detach(), "mean").item())
        accelerator.print(f"step {step} loss {losses[-1]:.8f}", flush=True)
    return losses


if __name__ == "__main__":
    main()
