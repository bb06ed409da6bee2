"""Collectives by the names of torch 2.13, which renamed them and warns at each call by an old name.

This file can go when 2.13 is the oldest torch that is supported.
"""

import torch
import torch.distributed as dist
from packaging.version import Version

_IS_RENAMED = Version(torch.__version__) >= Version("2.13")
all_gather_single = dist.all_gather_single if _IS_RENAMED else dist.all_gather_into_tensor
reduce_scatter_single = dist.reduce_scatter_single if _IS_RENAMED else dist.reduce_scatter_tensor
