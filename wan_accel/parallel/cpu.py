"""Make accelerate honour FSDP2 on CPU."""

import functools
from typing import Any

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType


def enable_fsdp_on_cpu() -> None:
    """Let `AcceleratorState` choose FSDP for several CPU processes when the launcher asks for it.

    Accelerate 1.15 promotes only its MULTI_<device> types to FSDP and leaves MULTI_CPU out (state.py,
    `AcceleratorState.__init__`), so a CPU job asked to shard runs plain DDP without a word. It can go when
    accelerate lists MULTI_CPU there. Call it before `TrainingArguments` or `Accelerator`; calling it again does
    nothing.
    """
    if getattr(AcceleratorState.__init__, "_wan_accel", False):
        return
    original = AcceleratorState.__init__

    @functools.wraps(original)
    def init(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.FSDP
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = fsdp_plugin
            # Every later AcceleratorState() copies the shared state back; accelerate writes it at this point too.
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    init._wan_accel = True  # type: ignore[attr-defined]
    AcceleratorState.__init__ = init
