"""ZeRO: one DeepSpeed engine an expert, and what Trainer needs to drive several."""

from collections.abc import Iterable
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from wan_accel.parallel.names import Offload


class JointOptimizer(torch.optim.Optimizer):
    """The optimizers of several engines as one, for a learning rate schedule: it owns nothing and steps nothing.

    An engine steps its own optimizer at the end of its backward pass, and only in steps that use its expert.
    """

    def __init__(self, optimizers: Iterable[Any]) -> None:
        # torch's constructor is left out on purpose: it would copy the groups, and the schedule has to reach the
        # engines' own.
        self.optimizers = list(optimizers)
        self.defaults: dict[str, Any] = {}
        self.state: Any = {}

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Nothing: `backward_zero` has stepped the engines."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Nothing: an engine clears its gradients when it steps."""


def prepare_engine(accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
    """A DeepSpeed engine of its own for `model`, and its optimizer. Collective.

    accelerate ties its `backward` to the first engine that it prepares and warns about a second one;
    `backward_zero` addresses an engine itself.
    """
    accelerator.deepspeed_engine_wrapped = None
    return accelerator.prepare(model, optimizer)


def backward_zero(engine: Any, loss: Tensor, *, is_last: bool) -> None:
    """Backward of a micro-batch; the last one of an optimizer step reduces, clips and steps the engine.

    `scale_wrt_gas=False`: the loss is a share of the step's mean already.
    """
    engine.set_gradient_accumulation_boundary(is_boundary=is_last)
    engine.backward(loss, scale_wrt_gas=False)
    if is_last:
        engine.step()


def refuse_offload(offload: Offload) -> None:
    """Refuse a moving average where ZeRO-3 keeps parameters or masters elsewhere than on the GPU.

    The average is made of DTensors on the GPU's mesh, which would bring all masters there at once.

    Raises:
        ValueError: there is offloading.
    """
    if offload != "none":
        raise ValueError(
            "method.ema cannot be used with ZeRO-3's offloading yet: set offload_optimizer_device and "
            "offload_param_device to none in the accelerate config, use ZeRO-2 or FSDP2, or remove method.ema"
        )
