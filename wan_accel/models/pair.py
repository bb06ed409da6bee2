"""Two experts in one run: a container that gives their parameters one tree of names."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from wan_accel.models.denoiser import WanDenoiser


class ExpertPair(nn.Module):
    """The denoisers of a pair under `high.` and `low.`. Each is called on its own; the container has no forward.

    Every engine wraps the experts one by one, so that one which a step does not use takes part in none of its
    collectives.
    """

    def __init__(self, experts: Mapping[str, WanDenoiser]) -> None:
        super().__init__()
        for name, expert in experts.items():
            self.add_module(name, expert)


def experts_of(model: nn.Module, expert: str) -> dict[str, WanDenoiser]:
    """The denoisers of a model by expert: those of a pair, or the model itself as `expert`."""
    found = dict(model.named_children()) if isinstance(model, ExpertPair) else {expert: model}
    assert all(isinstance(denoiser, WanDenoiser) for denoiser in found.values())
    return found  # type: ignore[return-value]


def split_by_expert(groups: list[dict[str, Any]], pair: ExpertPair) -> list[dict[str, Any]]:
    """Split an optimizer's parameter groups, so that none holds parameters of two experts; empty ones go."""
    owned = {name: {id(parameter) for parameter in expert.parameters()} for name, expert in pair.named_children()}
    return [
        {**group, "params": params}
        for group in groups
        for ids in owned.values()
        if (params := [parameter for parameter in group["params"] if id(parameter) in ids])
    ]
