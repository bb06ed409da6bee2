"""What compiled blocks go with, and what needs them. Torch-free."""

from typing import Protocol


class BlockSettings(Protocol):
    """What is done to the blocks, as the recipe's `memory` has it."""

    @property
    def activation_checkpointing(self) -> str | float: ...

    @property
    def compile(self) -> bool: ...

    @property
    def fp8(self) -> bool: ...


def compile_problems(settings: BlockSettings, engine: str | None) -> list[str]:
    """What of these settings does not go together, on an engine where it is known; one line each."""
    problems = []
    if settings.compile and engine == "zero3":
        problems.append(
            "memory.compile: true does not work under ZeRO-3, which gathers parameters inside the blocks: use FSDP2 "
            "(fsdp2.yaml), or set memory.compile: false"
        )
    if not settings.compile and not isinstance(settings.activation_checkpointing, str):
        problems.append(
            f"memory.activation_checkpointing={settings.activation_checkpointing} needs memory.compile: true: it is "
            "the compiler that keeps to a budget; use attention, full or none without it"
        )
    if not settings.compile and settings.fp8:
        problems.append(
            "memory.fp8=True needs memory.compile: true: casts that are not fused cost more than 8 bits save"
        )
    return problems
