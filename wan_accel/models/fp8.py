"""Linear layers of a block with 8-bit matrix products (`memory.fp8`).

Shapes: M tokens, K inputs, N outputs. Scales are dynamic, one a tensor: x = data * scale, with scale = max |x| / the
largest number of the format. Inputs and weights are e4m3 (3 bits of mantissa), gradients e5m2 (5 of exponent), as in
Micikevicius et al. 2022, "FP8 Formats for Deep Learning". Sums are fp32; results have the input's dtype.

The weight is quantised where it is used, from the parameter: under FSDP2 a rank holds a slice of it only, and a second
copy in 8 bits would undo the sharding. Reading it costs 2 bytes a weight against 2 products for each of its M tokens.
"""

from typing import Any

import torch
from torch import Tensor, nn

from wan_accel.models.denoiser import WanDenoiser

MIN_CAPABILITY = (8, 9)
# Both inner dims of torch._scaled_mm are multiples of this on CUDA; rows of the left matrix are free.
ALIGNMENT = 16
INPUT, GRADIENT = torch.float8_e4m3fn, torch.float8_e5m2


def check_fp8(device: torch.device) -> None:
    """Check that a device multiplies in fp8. The CPU emulates it, to try things: it rounds as a GPU does.

    Raises:
        ValueError: a GPU that cannot.
    """
    if device.type != "cuda":
        return
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        raise ValueError(
            f"memory.fp8: true needs compute capability {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]} (Ada, Hopper, "
            f"Blackwell) and {torch.cuda.get_device_name(device)} has {capability[0]}.{capability[1]}: remove the key"
        )


def convert_to_fp8(model: WanDenoiser) -> list[str]:
    """Replace the linears of the transformer blocks, LoRA's base layers among them, in place; returns their names.

    Adapters, embeddings, head, modulation, norms and Animate's face blocks stay. Names in the state dict stay.

    Raises:
        ValueError: a layer's sizes are not multiples of 16.
    """
    converted = []
    for name, module in list(model.named_modules()):
        if name.startswith("blocks.") and type(module) is nn.Linear and ".lora_" not in name:
            for size in (module.in_features, module.out_features):
                if size % ALIGNMENT:
                    raise ValueError(f"memory.fp8: true: {name} has a side of {size}, not a multiple of {ALIGNMENT}")
            model.set_submodule(name, Fp8Linear(module))
            converted.append(name)
    return converted


class Fp8Linear(nn.Linear):
    """A linear layer that takes over another's parameters and multiplies in fp8, forward and backward."""

    def __init__(self, source: nn.Linear) -> None:
        super().__init__(source.in_features, source.out_features, bias=source.bias is not None, device="meta")
        self.weight, self.bias = source.weight, source.bias

    def forward(self, x: Tensor) -> Tensor:
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        out = _Fp8Product.apply(x.flatten(0, -2), weight)
        return (out if bias is None else out + bias).unflatten(0, x.shape[:-1])


class _Fp8Product(torch.autograd.Function):
    """x (M, K) @ weight (N, K)^T; backward both products in fp8, that of a frozen weight is left out."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        data, scale = quantise(x, INPUT)
        # The input is kept in 8 bits; the weight as the parameter that it is, which a sharded model frees in between.
        ctx.save_for_backward(data, scale, weight)
        ctx.dtype = x.dtype
        weight_data, weight_scale = quantise(weight, INPUT)
        return scaled_product(data, weight_data.t(), scale, weight_scale, x.dtype, fast=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        data, scale, weight = ctx.saved_tensors
        grad_data, grad_scale = quantise(grad, GRADIENT)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            weight_data, weight_scale = quantise(weight, INPUT)
            grad_x = scaled_product(grad_data, by_columns(weight_data), grad_scale, weight_scale, ctx.dtype)
        if ctx.needs_input_grad[1]:
            rows = pad_rows(grad_data).t().contiguous()  # (N, M): here the tokens are summed over
            grad_weight = scaled_product(rows, by_columns(pad_rows(data)), grad_scale, scale, weight.dtype)
        return grad_x, grad_weight


def quantise(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x in fp8 and its scale, fp32 without dims: x is about data * scale."""
    largest = torch.finfo(dtype).max
    scale = x.abs().amax().float().clamp(min=1e-12) / largest
    return (x.float() / scale).clamp(-largest, largest).to(dtype), scale


def by_columns(x: Tensor) -> Tensor:
    """The same matrix, its columns contiguous, as the right side of a product has to be."""
    return x.t().contiguous().t()


def pad_rows(x: Tensor) -> Tensor:
    """Zero rows up to a multiple of 16 (M of 32,760 is none)."""
    missing = -x.shape[0] % ALIGNMENT
    return torch.cat([x, x.new_zeros(missing, x.shape[1])]) if missing else x


def scaled_product(
    left: Tensor, right: Tensor, left_scale: Tensor, right_scale: Tensor, dtype: torch.dtype, *, fast: bool = False
) -> Tensor:
    """left (a, b) @ right (b, c) times both scales, in `dtype`; right's columns are contiguous, b and c % 16 == 0.

    `fast` sums partly below fp32, which is exact enough for a forward pass.
    """
    if not left.is_cuda:
        return ((left.float() @ right.float()) * (left_scale * right_scale)).to(dtype)
    return torch._scaled_mm(
        left, right, scale_a=left_scale, scale_b=right_scale, out_dtype=dtype, use_fast_accum=fast
    )
