"""The tensors in a checkpoint's files, read one at a time on one process."""

import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from functools import cached_property
from io import StringIO
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from wan_accel.models.errors import CheckpointError

ReadTensor = Callable[[str], Tensor]
# What reading a file that is missing, cut short or overwritten raises somewhere inside.
_DAMAGE = (RuntimeError, ValueError, OSError, KeyError, EOFError, pickle.PickleError)


class _Files(dcp.FileSystemReader):
    """Reads the metadata once: that of a run on many ranks takes seconds, which every tensor would cost again."""

    @cached_property
    def metadata(self) -> dcp.Metadata:
        return super().read_metadata()

    def read_metadata(self, *args: Any, **kwargs: Any) -> dcp.Metadata:
        return self.metadata


def dcp_tensors(folder: Path, key: str) -> ReadTensor:
    """Read what torch.distributed.checkpoint wrote as {key: {name: tensor}}: name -> fp32 tensor as it is stored.

    Raises:
        CheckpointError: files are missing or damaged; now, or when a tensor is read.
    """
    files = _Files(folder)
    with _explained(folder):
        stored: Mapping[str, Any] = files.metadata.state_dict_metadata

    def read(name: str) -> Tensor:
        with _explained(folder):
            state = {key: {name: torch.empty(stored[f"{key}.{name}"].size)}}
            dcp.load(state, storage_reader=files, no_dist=True)
        return state[key][name]

    return read


def zero_tensors(folders: Mapping[str, Path]) -> ReadTensor:
    """Read the fp32 masters that DeepSpeed wrote under ZeRO-2 or ZeRO-3; the ranks' files are mapped, not read.

    Args:
        folders: what stands before an engine's names -> its folder.

    Raises:
        CheckpointError: files are missing or damaged; now, or when a tensor is read.
    """
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    stored: dict[str, Any] = {}
    for prefix, folder in folders.items():
        with _explained(folder), redirect_stdout(StringIO()):  # it prints what it does
            state = get_fp32_state_dict_from_zero_checkpoint(
                str(folder), exclude_frozen_parameters=True, lazy_mode=True
            )
        stored |= {prefix + name: tensor for name, tensor in state.items()}

    def read(name: str) -> Tensor:
        with _explained(next(folder for prefix, folder in folders.items() if name.startswith(prefix))):
            return stored[name].contiguous()

    return read


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Turn what torch and DeepSpeed raise for damaged files into one sentence."""
    try:
        yield
    except (dcp.CheckpointException, *_DAMAGE) as error:
        # The first is no Exception, and holds that of each rank.
        cause = next(iter(error.failures.values()))[0] if isinstance(error, dcp.CheckpointException) else error
        reason = f"{type(cause).__name__}: {str(cause).partition(chr(10))[0]}"
        raise CheckpointError(
            f"{folder} is damaged or incomplete ({reason}): use another checkpoint of the run"
        ) from error
