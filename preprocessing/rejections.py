"""What a run turned down, by reason."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from preprocessing.ledger import Ledger

_NUM_EXAMPLES = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Reason:
    """How many videos and clips were turned down for a reason, and some sentences about them."""

    name: str
    num_videos: int
    num_clips: int
    examples: list[str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Rejections:
    """Reasons, the most frequent first; videos that were worked on; figures of the clips that were turned down."""

    reasons: list[Reason]
    num_videos: int
    num_videos_rejected: int
    num_clips_rejected: int
    quality: dict[str, np.ndarray]


def read_rejections(dataset: Path) -> Rejections:
    """Read the outcomes of all videos from the parts' sidecars, as rejected.jsonl is made from."""
    ledger = Ledger(dataset)
    records = ledger.rejections()
    by_reason: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        by_reason[record["reason"]].append(record)
    reasons = [_reason(name, found) for name, found in by_reason.items()]
    return Rejections(
        reasons=sorted(reasons, key=lambda reason: (-reason.num_videos - reason.num_clips, reason.name)),
        num_videos=len(ledger.outcomes),
        num_videos_rejected=sum(reason.num_videos for reason in reasons),
        num_clips_rejected=sum(reason.num_clips for reason in reasons),
        quality=_quality(records),
    )


def _reason(name: str, records: Sequence[dict[str, Any]]) -> Reason:
    num_videos = sum(record["clip_id"] is None for record in records)
    chosen = np.unique(np.linspace(0, len(records) - 1, _NUM_EXAMPLES).round().astype(int))
    return Reason(
        name=name,
        num_videos=num_videos,
        num_clips=len(records) - num_videos,
        examples=[_sentence(records[index]) for index in chosen],
    )


def _sentence(record: dict[str, Any]) -> str:
    about = record["clip_id"] or record["path"]
    return record["detail"] if about in record["detail"] else f"{about}: {record['detail']}"


def _quality(records: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
    found: dict[str, list[float]] = defaultdict(list)
    for record in records:
        for name, value in (record.get("quality") or {}).items():
            if value is not None and np.isfinite(value):
                found[name].append(value)
    return {name: np.array(numbers) for name, numbers in found.items()}
