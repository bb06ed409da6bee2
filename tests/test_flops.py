"""The FLOP formula against torch's counter, and the work of ranks by it."""

import dataclasses
import logging
import math
from typing import Any

import pytest
import torch
from synthetic import tiny_denoiser
from torch.utils.flop_counter import FlopCounterMode

from wan_accel.dealing import imbalance
from wan_accel.draws import Bucket, DatasetIndex
from wan_accel.flops import PEAK_TFLOPS, Work, peak_tflops, step_flops
from wan_accel.lora import LoraSettings, inject_lora
from wan_accel.models.denoiser import WanDenoiser
from wan_accel.models.dit import AnimateSize, build_animate_adapter, build_dit
from wan_accel.models.variants import VARIANTS, DitSize
from wan_accel.step_plan import StepPlan
from wan_accel.throughput import Throughput, size_of

SIZE = DitSize(
    dim=96, ffn_dim=384, num_layers=6, num_heads=8, in_dim=16, out_dim=16, freq_dim=32, text_dim=16, eps=1e-6
)  # fmt: skip
GRID = (5, 24, 32)  # latent frames, height, width: 960 tokens
ANIMATE = AnimateSize(
    dim=96, num_heads=8, num_face_blocks=2, motion_channels=(2,) * 8, motion_dim=16, face_width=8
)


def attention_flops(q: Any, k: Any, v: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Two products of L x S x D a head; CPU attention is not in torch's own table."""
    return 4 * math.prod(q) * k[-2]


def attention_backward_flops(grad: Any, q: Any, k: Any, v: Any, *args: Any, out_shape: Any = None, **kw: Any) -> int:
    return 2 * attention_flops(q, k, v)


COUNTED = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flops,
}


def counted(model: WanDenoiser, size: DitSize, animate: bool) -> float:
    generator = torch.Generator().manual_seed(0)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(1, *shape, generator=generator)

    inputs = {"hidden_states": rand(16, *GRID), "timestep": torch.tensor([500.0]), "text": rand(64, 16)}
    if animate:
        inputs |= {
            "condition": rand(20, *GRID), "clip_features": rand(257, 40), "pose_latents": rand(16, 4, *GRID[1:]),
            "motion_vectors": rand(13, 16),
        }  # fmt: skip
    with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
        model(**inputs).square().mean().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("variant", ["t2v-1.3b", "animate-14b"])
def test_formula_is_what_torch_counts(variant: str, method: str) -> None:
    animate = variant == "animate-14b"
    size = dataclasses.replace(SIZE, in_dim=36, clip_dim=40) if animate else SIZE
    model = WanDenoiser(build_dit(size), build_animate_adapter(ANIMATE) if animate else None, text_length=64)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    if method == "lora":
        inject_lora(model, LoraSettings(r=8), VARIANTS[variant])
    assert size_of(model).dim == size.dim and size_of(model).ffn_dim == size.ffn_dim
    work = Work(lora_rank=8 if method == "lora" else None, has_face_blocks=animate, text_length=64)
    expected = counted(model, size, animate)
    assert step_flops(size_of(model), 5 * 12 * 16, work) == pytest.approx(expected, rel=0.01)


def test_released_size_by_hand() -> None:
    """480p, 81 frames on an A14B expert: parameters of the blocks x tokens, and attention."""
    size, tokens = VARIANTS["t2v-a14b"].dit, 32760
    forward = step_flops(size, tokens, Work()) / 3
    linears = 2 * tokens * 40 * (6 * 5120**2 + 2 * 5120 * 13824)
    attention = 40 * 4 * tokens**2 * 5120
    assert forward == pytest.approx(linears + attention, rel=0.02)  # and 512 text tokens, head, patches


def test_peaks() -> None:
    assert peak_tflops("NVIDIA H100 80GB HBM3") == 989.4
    assert peak_tflops("NVIDIA H100 PCIe") == PEAK_TFLOPS["H100 PCIe"]
    assert peak_tflops("NVIDIA A100-SXM4-80GB") == 312.0
    assert peak_tflops("NVIDIA H200") == 989.4 and peak_tflops("NVIDIA H20") == 148.0
    assert peak_tflops("NVIDIA GH200 480GB") == 989.4 and peak_tflops("NVIDIA H200 NVL") == 835.5
    assert peak_tflops("NVIDIA GB200") == 2500.0 and peak_tflops("NVIDIA B200") == 2250.0
    assert peak_tflops("NVIDIA L40S") == 362.05 and peak_tflops("NVIDIA GeForce RTX 4090") == 165.2
    assert peak_tflops("cpu") is None


def test_an_unknown_gpu_has_no_mfu_and_the_log_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Z1")
    counter = Throughput(tiny_denoiser("t2v-1.3b"), None, ulysses=1, device=torch.device("cuda"))
    for _ in range(2):
        counter.add(torch.Size((1, 16, 3, 4, 6)))
        assert set(counter.take(1.0)) == {"tokens_per_second_per_gpu", "tflops_per_gpu"}
    assert [line.getMessage() for line in caplog.records] == [
        "no mfu in this run's log: NVIDIA Z1 has no row in PEAK_TFLOPS of wan_accel/flops.py"
    ]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    known = Throughput(tiny_denoiser("t2v-1.3b"), None, ulysses=1, device=torch.device("cuda"))
    known.add(torch.Size((1, 16, 3, 4, 6)))
    assert "mfu" in known.take(1.0) and len(caplog.records) == 1


@pytest.mark.parametrize("name", ["t2v-a14b", "ti2v-5b"])
def test_ranks_have_even_work_in_a_mixed_epoch(name: str) -> None:
    variant = VARIANTS[name]
    kinds = [Bucket(81, 480, 832), Bucket(49, 480, 832), Bucket(33, 704, 1280), Bucket(17, 256, 448)]
    buckets = tuple(bucket for bucket, count in zip(kinds, (700, 500, 300, 500)) for _ in range(count))
    plan = StepPlan(DatasetIndex(buckets=buckets, num_known=(0,) * len(buckets)), seed=1, global_batch=32)
    for num_ranks in (2, 8, 16):
        steps = [plan.step(number, num_ranks) for number in range(plan.steps_per_epoch)]
        spent = imbalance(steps, lambda bucket: step_flops(variant.dit, variant.num_tokens(*bucket), Work()))
        assert spent <= 0.05
