"""The clips of a report: what is said of each beside its picture."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from preprocessing.clip_media import Media
from preprocessing.clip_table import QUALITY_PREFIX, figures, values
from preprocessing.figures import FIGURES

_ODD = 0.05  # figures among this share at the bad end are marked, where that is a clip or more


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """A clip as it is shown: facts, figures (label, text, whether it is odd), values for sorting, files."""

    clip_id: str
    caption: str
    origin: str
    facts: str
    figures: list[tuple[str, str, bool]]
    values: str
    media: Media


class CardMaker:
    """Makes cards of rows of a clip table; marks figures at the bad end of the whole table."""

    def __init__(self, table: pa.Table) -> None:
        self._limits = {}
        for name in figures(table):
            numbers = values(table, QUALITY_PREFIX + name)
            if name in FIGURES and len(numbers) * _ODD >= 1:
                share = _ODD if FIGURES[name].bad_end == "low" else 1 - _ODD
                self._limits[name] = float(np.quantile(numbers, share))

    def card(self, row: Mapping[str, Any], media: Media) -> Card:
        """A card of a row, as `pyarrow.Table.to_pylist` gives it."""
        found = {name: row.get(QUALITY_PREFIX + name) for name in FIGURES}
        known: dict[str, float] = {name: value for name, value in found.items() if value is not None}
        facts = [row["size"], f"{row['num_frames']} frames", f"{_seconds(row['seconds'])} s", row.get("purpose")]
        start, end = _seconds(row["source.start_seconds"]), _seconds(row["source.end_seconds"])
        return Card(
            clip_id=row["clip_id"] or "no clip_id",
            caption=row["caption"] or "",
            origin=f"{row['source.path']}, {start}–{end} s, track {row['source.track']}",
            facts=" · ".join(fact for fact in facts if fact),
            figures=[
                (FIGURES[name].label, f"{value:{FIGURES[name].format}}", self._is_odd(name, value))
                for name, value in known.items()
            ],
            values=json.dumps({name: round(value, 5) for name, value in known.items()}),
            media=media,
        )

    def _is_odd(self, name: str, value: float) -> bool:
        limit = self._limits.get(name)
        if limit is None:
            return False
        return value < limit if FIGURES[name].bad_end == "low" else value > limit


def _seconds(value: float | None) -> str:
    return "?" if value is None else f"{value:.2f}"
