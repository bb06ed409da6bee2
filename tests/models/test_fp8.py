"""fp8 linears, emulated on the CPU: numerics, which layers, LoRA on top, learning."""

import dataclasses

import pytest
import torch
from diffsynth.models.wan_video_dit import WanModel
from synthetic import tiny_denoiser

from wan_accel.lora import LoraSettings, inject_lora
from wan_accel.models import fp8
from wan_accel.models.denoiser import WanDenoiser
from wan_accel.models.dit import build_dit
from wan_accel.models.fp8 import Fp8Linear, check_fp8, convert_to_fp8, pad_rows, quantise
from wan_accel.models.variants import VARIANTS, DitSize


def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(2, 16, 3, 4, 6, generator=generator),
        "timestep": torch.tensor([321.7, 950.3]),
        "text": torch.randn(2, 16, 24, generator=generator),
    }


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((found - expected).norm() / expected.norm()).detach())


@pytest.mark.parametrize("num_tokens", [32, 45])
def test_linear_and_its_gradients(num_tokens: int) -> None:
    """e4m3 rounds to 1/16 at most, e5m2 to 1/8; over sums of random signs the relative error stays there."""
    torch.manual_seed(0)
    plain = torch.nn.Linear(64, 48)
    linear = Fp8Linear(plain)
    x = torch.randn(3, num_tokens, 64, requires_grad=True)
    grad = torch.randn(3, num_tokens, 48)
    expected = plain(x)
    wanted = torch.autograd.grad(expected, (x, plain.weight, plain.bias), grad)
    out = linear(x)
    found = torch.autograd.grad(out, (x, linear.weight, linear.bias), grad)
    assert 0.001 < relative(out, expected) < 0.05
    assert 0.001 < relative(found[0], wanted[0]) < 0.1 and 0.001 < relative(found[1], wanted[1]) < 0.1
    torch.testing.assert_close(found[2], wanted[2])  # the bias is not in fp8


def test_quantise() -> None:
    data, scale = quantise(torch.tensor([[1.0, -448.0, 0.5, 0.0]]), torch.float8_e4m3fn)
    assert float(scale) == 1.0 and data.float().tolist() == [[1.0, -448.0, 0.5, 0.0]]
    zeros, scale = quantise(torch.zeros(2, 4), torch.float8_e5m2)
    assert torch.equal(zeros.float() * scale, torch.zeros(2, 4))
    assert pad_rows(torch.ones(32760, 2)).shape == (32768, 2) and float(pad_rows(torch.ones(30, 1)).sum()) == 30


def test_frozen_weights_get_no_gradient_and_no_product() -> None:
    linear = Fp8Linear(torch.nn.Linear(32, 32).requires_grad_(False))
    x = torch.randn(16, 32, requires_grad=True)
    out = linear(x).sum()
    products = []
    original = fp8.scaled_product
    fp8.scaled_product = lambda *args, **options: products.append(1) or original(*args, **options)
    try:
        out.backward()
    finally:
        fp8.scaled_product = original
    assert len(products) == 1 and linear.weight.grad is None and x.grad is not None


@pytest.mark.parametrize("method", ["lora", "full"])
def test_only_base_linears_of_transformer_blocks(method: str) -> None:
    model = tiny_denoiser("animate-14b")
    if method == "lora":
        inject_lora(model, LoraSettings(r=4), VARIANTS["animate-14b"])
    names = [name for name, _ in model.named_parameters()]
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    state = list(model.state_dict())
    converted = convert_to_fp8(model)
    assert len(converted) == 12 * 6  # q k v o twice, k_img v_img, two of the feed-forward
    assert all(name.startswith("blocks.") and ".lora_" not in name for name in converted)
    assert [name for name, _ in model.named_parameters()] == names and list(model.state_dict()) == state
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == trained
    assert {n for n, m in model.named_modules() if isinstance(m, Fp8Linear)} == set(converted)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_learns_as_fp32_does(method: str) -> None:
    """The same data, seed and steps: two loss curves that fall together."""
    curves = []
    for converts in (False, True):
        torch.manual_seed(0)
        model = tiny_denoiser("t2v-1.3b")
        if method == "lora":
            inject_lora(model, LoraSettings(r=4, lora_alpha=8.0), VARIANTS["t2v-1.3b"])
            for name, parameter in model.named_parameters():
                if ".lora_A." in name:
                    torch.nn.init.normal_(parameter, std=0.1)
                elif ".lora_B." in name:
                    torch.nn.init.zeros_(parameter)
        if converts:
            convert_to_fp8(model)
        target = torch.randn(2, 16, 3, 4, 6, generator=torch.Generator().manual_seed(2))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        curve = []
        for _ in range(25):
            loss = (model(**inputs()) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
        curves.append(curve)
    plain, eighth = curves
    assert plain != eighth
    assert plain[-1] < 0.8 * plain[0] and eighth[-1] == pytest.approx(plain[-1], rel=0.15)


def test_sizes_and_devices_that_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    size = DitSize(dim=72, ffn_dim=64, num_layers=1, num_heads=6, in_dim=16, out_dim=16, freq_dim=32, text_dim=24)
    dit: WanModel = build_dit(dataclasses.replace(size))
    with pytest.raises(ValueError, match=r"blocks\.0\.self_attn\.q has a side of 72, not a multiple of 16"):
        convert_to_fp8(WanDenoiser(dit))
    check_fp8(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    with pytest.raises(ValueError, match=r"needs compute capability 8\.9 .* NVIDIA A100 has 8\.0"):
        check_fp8(torch.device("cuda"))
