"""Which layers get adapters, and their precision on every engine."""

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import write_checkpoint
from ranks import run_ranks
from small_run import full_weights, small_trainer
from synthetic import SyntheticSource, plan_for, tiny_denoiser

from wan_accel.data.collate import StepDataset
from wan_accel.lora import LoraSettings, expand_targets, inject_lora, is_lora
from wan_accel.models.denoiser import WanDenoiser
from wan_accel.models.variants import VARIANTS
from wan_accel.noising import conditions_of

ANIMATE, T2V = VARIANTS["animate-14b"], VARIANTS["t2v-1.3b"]
FACE = {"linear1_q", "linear1_kv", "linear2"}


def adapted(variant: str, *targets: str) -> tuple[WanDenoiser, set[str]]:
    """A denoiser with adapters that all have a share in the output, and the layers they are on."""
    model = tiny_denoiser(variant)
    inject_lora(model, LoraSettings(r=4, target_modules=targets), VARIANTS[variant])
    generator = torch.Generator().manual_seed(2)
    names = [name for name, _ in model.named_parameters() if is_lora(name)]
    for name in names:
        parameter = model.get_parameter(name)
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return model, {name.split(".lora_")[0] for name in names}


def test_words_stand_for_groups_of_layers() -> None:
    assert expand_targets((), ANIMATE) == expand_targets(("default",), ANIMATE) == ANIMATE.lora_targets
    assert expand_targets(("q", "default", "face"), ANIMATE) == (
        "q", "k", "v", "o", "ffn.0", "ffn.2", "linear1_q", "linear1_kv", "linear2",
    )  # fmt: skip
    _, plain = adapted("animate-14b")
    assert all(name.startswith("blocks.") for name in plain)
    assert len(plain) == 6 * 10  # of each block: q, k, v, o of both attentions and the ffn's two
    _, wide = adapted("animate-14b", "default", "face", "image")
    assert wide - plain == {f"face_adapter.fuser_blocks.{block}.{layer}" for block in range(2) for layer in FACE} | {
        f"blocks.{block}.cross_attn.{layer}" for block in range(6) for layer in ("k_img", "v_img")
    }
    _, one = adapted("animate-14b", "face_adapter.fuser_blocks.1.linear2", "5.self_attn.q")
    assert one == {"face_adapter.fuser_blocks.1.linear2", "blocks.5.self_attn.q"}


def test_every_adapter_of_every_group_is_trained() -> None:
    model, _ = adapted("animate-14b", "default", "face", "image")
    source = SyntheticSource("animate-14b")
    step = StepDataset(source, plan_for(source), data_rank=0, num_data_ranks=1)[0]
    batch = step["micro_batches"][0]
    conditions = conditions_of(batch, batch["sigma"], ANIMATE)
    predicted = model(batch["noise"], 1000 * batch["sigma"], **conditions)
    (predicted - batch["latents"]).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == is_lora(name)
        if parameter.grad is not None:
            assert parameter.grad.abs().max() > 0, name


def test_targets_that_match_nothing() -> None:
    with pytest.raises(ValueError, match=r"linear1_q, linear1_kv, linear2 match no linear layer of t2v-1.3b: use"):
        adapted("t2v-1.3b", "default", "face")
    with pytest.raises(ValueError, match=r"cross_attn.k_img, cross_attn.v_img match no linear layer of t2v-1.3b"):
        adapted("t2v-1.3b", "image")
    with pytest.raises(ValueError, match=r"qkv match no linear layer of animate-14b: .* or default, face, image"):
        adapted("animate-14b", "q", "qkv")


ENGINES = {"single": 1, "ddp": 2, "fsdp2": 2, "fsdp2-bf16": 2}


def step_on_bf16_base(base: str, output_dir: str, engine: str) -> dict[str, Any]:
    """Dtypes of a LoRA over a bf16 base after a step, and by how much it moved."""
    trainer = small_trainer(
        base, output_dir, engine, method="lora", torch_dtype=torch.bfloat16, max_steps=1, save_strategy="no",
        learning_rate=1e-5,
    )  # fmt: skip
    trainer.train()
    parameters = dict(trainer.accelerator.unwrap_model(trainer.model).named_parameters())
    moments = {
        value.dtype
        for state in trainer.optimizer.state.values()
        for name, value in state.items()
        if name in ("exp_avg", "exp_avg_sq")
    }
    return {
        "adapters": {p.dtype for name, p in parameters.items() if is_lora(name)},
        "base": {p.dtype for name, p in parameters.items() if not is_lora(name)},
        "moments": moments,
        "weights": full_weights(trainer),
    }


@pytest.mark.parametrize("engine", ENGINES)
def test_fp32_adapters_over_a_bf16_base(engine: str, tmp_path: Path) -> None:
    base = str(write_checkpoint(tmp_path / "base", "t2v-1.3b"))
    for result in run_ranks(step_on_bf16_base, ENGINES[engine], base, str(tmp_path / "run"), engine, engine=engine):
        assert result["adapters"] == {torch.float32}
        assert result["base"] == {torch.bfloat16}
        assert result["moments"] == {torch.float32}
        assert {weight.dtype for weight in result["weights"].values()} == {torch.float32}
        moved = [weight.abs().max().item() for name, weight in result["weights"].items() if ".lora_B." in name]
        assert moved == pytest.approx([1e-5] * len(moved), rel=1e-2)  # B starts at 0; AdamW's first step is the rate


def test_zero3_needs_mixed_precision_for_a_bf16_base(tmp_path: Path) -> None:
    """There the masters are in the optimizer, with mixed precision only (for which TrainingArguments want a GPU)."""
    base = str(write_checkpoint(tmp_path / "base", "t2v-1.3b"))
    with pytest.raises(RuntimeError, match=r"model.torch_dtype=bfloat16 under ZeRO needs mixed_precision: bf16"):
        run_ranks(step_on_bf16_base, 2, base, str(tmp_path / "run"), "zero3", engine="zero3")
