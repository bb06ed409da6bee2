"""Attention backends: refused where they cannot run, and put where Ulysses finds them."""

import sys
import types

import pytest
import torch
import torch.nn.functional as F
from synthetic import tiny_denoiser

from wan_accel.models import attention
from wan_accel.models.attention import ATTENTION_BACKENDS, FlashAttention2, check_attention
from wan_accel.models.denoiser import set_attention
from wan_accel.recipe.schema import Model

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_the_recipe_names_the_table() -> None:
    assert set(Model.__annotations__["attention"].__args__) == set(ATTENTION_BACKENDS)


@pytest.mark.parametrize("name", ["cudnn", "flash_2", "flash_3"])
def test_refused_on_cpu(name: str) -> None:
    check_attention("sdpa", CPU)
    with pytest.raises(ValueError, match=f"model.attention={name} needs an NVIDIA GPU, and this run is on cpu"):
        check_attention(name, CPU)


def test_refused_on_other_gpus_and_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    with pytest.raises(ValueError, match=r"flash_3 needs compute capability 9\.x \(Hopper: .*NVIDIA A100 has 8\.x"):
        check_attention("flash_3", CUDA)
    with pytest.raises(ValueError, match="flash_2 needs the module flash_attn: pip install flash-attn"):
        check_attention("flash_2", CUDA)
    check_attention("cudnn", CUDA)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with pytest.raises(ValueError, match=r"flash_attn_interface: git clone .*folder hopper python setup\.py install"):
        check_attention("flash_3", CUDA)


def test_flash_attention_gets_heads_last_and_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package's layout (B, L, H, D), with torch's attention in its place: there is no GPU here."""
    package = types.ModuleType("flash_attn")
    package.flash_attn_func = lambda q, k, v: F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v))
    ).transpose(1, 2)
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    q, k, v = torch.randn(3, 2, 10, 24).bfloat16()
    torch.testing.assert_close(FlashAttention2(4)(q, k, v), attention.SdpaAttention(4)(q, k, v))
    with pytest.raises(TypeError, match=r"takes bfloat16, not torch\.float32"):
        FlashAttention2(4)(q.float(), k.float(), v.float())
    model = tiny_denoiser("t2v-1.3b")
    names = list(model.state_dict())
    set_attention(model, "flash_2")
    assert all(type(block.cross_attn.attn) is FlashAttention2 for block in model.transformer_blocks)
    assert list(model.state_dict()) == names
