"""Where the tensors of a safetensors file lie, and reading their rows straight into memory.

The library maps files, which costs a page fault every 64 KiB, small reads on network disks, and a copy more on the way
to a GPU. Format: eight bytes that hold the length of a JSON header, the header, the tensors (safetensors' README).
"""

import json
import os
from pathlib import Path

import torch
from torch import Tensor

_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
    "I64": torch.int64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F16": torch.float16,
    "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
}  # fmt: skip


class SafetensorsFile:
    """A file whose header is sound (`open_safetensors` has looked)."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb", buffering=0)
        header_bytes = int.from_bytes(self._file.read(8), "little")
        self._header = json.loads(self._file.read(header_bytes))
        self._start = 8 + header_bytes

    def place(self, name: str, rows: slice | None) -> tuple[int, int]:
        """Offset and length in bytes of a tensor, or of some rows of its dim 0."""
        (first, end), shape = self._header[name]["data_offsets"], self._header[name]["shape"]
        if rows is None:
            return self._start + first, end - first
        start, stop, _ = rows.indices(shape[0])
        row_bytes = (end - first) // max(shape[0], 1)
        return self._start + first + start * row_bytes, max(stop - start, 0) * row_bytes

    def dtype(self, name: str) -> torch.dtype | None:
        """The dtype of a tensor; None for one that is not known here."""
        return _DTYPES.get(self._header[name]["dtype"])

    def read_into(self, name: str, rows: slice | None, target: Tensor) -> None:
        """Read a tensor, or some rows of it, into a contiguous CPU tensor of its dtype and number of elements.

        Raises:
            OSError: the file has become shorter.
        """
        offset, length = self.place(name, rows)
        buffer, done = memoryview(target.view(-1).view(torch.uint8).numpy().data), 0
        if len(buffer) != length:
            raise ValueError(f"{self._file.name}: {name} has {length} bytes here, room for {len(buffer)} was given")
        while done < length:  # one call reads 2 GiB at most
            count = os.preadv(self._file.fileno(), [buffer[done:]], offset + done)
            if count == 0:
                raise OSError(f"{self._file.name} ends inside of {name}: it was changed while it is read")
            done += count
