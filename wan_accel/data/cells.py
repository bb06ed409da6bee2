"""Tensors in cells of a row of a latents folder, bit for bit. What is wrong with such a folder is a `LatentsError`."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wan_accel.data.store import StoreError

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}


class LatentsError(StoreError):
    """Cached conditions that cannot be trained on: what is missing or stale, and what to do."""


def tensor_to_cell(tensor: Tensor) -> dict[str, Any]:
    """A tensor as {dtype, shape, data}; bfloat16 bit for bit."""
    tensor = tensor.detach().cpu().contiguous()
    return {
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": list(tensor.shape),
        "data": tensor.reshape(-1).view(torch.uint8).numpy().tobytes(),
    }


def cell_to_tensor(cell: Mapping[str, Any]) -> Tensor:
    """The inverse of `tensor_to_cell`.

    Raises:
        LatentsError: the cell's bytes do not have the length that its shape says.
    """
    dtype, shape = _DTYPES[cell["dtype"]], [int(n) for n in cell["shape"]]
    data = bytearray(cell["data"])
    if len(data) != int(np.prod(shape)) * dtype.itemsize:
        raise LatentsError(
            f"a tensor cell has {len(data)} bytes, expected shape {shape} of {cell['dtype']}: copy the folder again, "
            "or encode into a new one"
        )
    return torch.frombuffer(data, dtype=dtype).reshape(shape)
