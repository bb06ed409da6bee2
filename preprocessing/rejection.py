"""Why a video or a clip was turned down."""

from dataclasses import dataclass


class Rejected(ValueError):
    """A video that gives no clips. `reason` is one word for grouping, the message says more."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True, kw_only=True, slots=True)
class RejectedClip:
    """A clip that is not good enough: the figure that says so, in a sentence, and all its figures."""

    clip_id: str
    reason: str
    detail: str
    quality: dict[str, float | None]
