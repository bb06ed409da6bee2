"""The charts of a report: every figure over all clips, and how often each size, rate and purpose comes."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from preprocessing.clip_table import QUALITY_PREFIX, figures, values
from preprocessing.figures import FIGURES
from preprocessing.histogram import Drawing, draw_histogram
from preprocessing.thresholds import Bound

_MOST_BARS = 8
_COUNTED = {
    "size": "size", "num_frames": "frames", "fps": "frames a second", "purpose": "purpose", "modes": "modes",
    "reference_source.kind": "reference", "settings_hash": "settings",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """A histogram with its name, what the figure says, and its main numbers in words."""

    title: str
    meaning: str
    facts: list[str]
    drawing: Drawing


@dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    """How often each value of a column comes, the most frequent first; the rare ones together."""

    title: str
    bars: list[tuple[str, int]]


def quality_charts(
    table: pa.Table, matching: pa.Table, turned_down: Mapping[str, np.ndarray], bounds: Mapping[str, Bound]
) -> list[Chart]:
    """A chart for each figure that a clip has: all clips, those of `--where`, and those that were turned down."""
    charts = []
    for name in figures(table):
        column = QUALITY_PREFIX + name
        numbers = values(table, column)
        lost = turned_down.get(name, np.empty(0))
        if len(numbers) + len(lost) == 0:
            continue
        bound = bounds.get(name, Bound())
        limits = {"min": bound.min, "max": bound.max}
        front = {"matching": values(matching, column)} if len(matching) < len(table) else {}
        drawing = draw_histogram(
            {"kept": numbers, "lost": lost},
            front=front,
            marks={f"{side} {limit:g}": limit for side, limit in limits.items() if limit is not None},
        )
        known = FIGURES.get(name)
        facts = [
            *_facts(numbers, known.format if known else ".4g"),
            *_missing(table, column),
            *_outside(table, column, bound),
        ]
        title, meaning = (known.label, f"{known.meaning} ({name})") if known else (name, "")
        charts.append(Chart(title=title, meaning=meaning, facts=facts, drawing=drawing))
    return charts


def violates(table: pa.Table, column: str, bound: Bound) -> np.ndarray:
    """Which clips (N,) lie outside a bound; one that lacks the figure violates a `min`, as when clips are made."""
    numbers = np.asarray(table[column].cast(pa.float64()).fill_null(np.nan))
    too_low = ~(numbers >= bound.min) if bound.min is not None else np.zeros(len(numbers), bool)
    return too_low | (numbers > bound.max) if bound.max is not None else too_low


def _missing(table: pa.Table, column: str) -> list[str]:
    count = table[column].null_count
    return [f"{count:,} clips without it"] if count else []


def _outside(table: pa.Table, column: str, bound: Bound) -> list[str]:
    if bound == Bound():
        return []
    count = int(violates(table, column, bound).sum())
    return [f"{count:,} clips ({count / max(len(table), 1):.1%}) outside the bound"]


def _facts(numbers: np.ndarray, form: str) -> list[str]:
    if len(numbers) == 0:
        return ["no clip has it"]
    low, middle, high = np.quantile(numbers, [0.05, 0.5, 0.95])
    return [f"median {middle:{form}}", f"5% below {low:{form}}", f"5% above {high:{form}}"]


def source_charts(table: pa.Table) -> list[Chart]:
    """Length of clips, and how many clips and people a video gave."""
    by_source = table.select(["source.sha256", "source.track"]).group_by("source.sha256")
    counts = by_source.aggregate([("source.track", "count"), ("source.track", "count_distinct")])
    captions = pc.utf8_trim_whitespace(pc.fill_null(table["caption"], ""))
    words = pc.if_else(pc.equal(captions, ""), 0, pc.list_value_length(pc.utf8_split_whitespace(captions)))
    found = {
        "duration": (values(table, "seconds"), "seconds that a clip lasts", ".3g"),
        "clips a video": (values(counts, "source.track_count"), "clips from the same source", ".0f"),
        "people a video": (values(counts, "source.track_count_distinct"), "tracks of the same source", ".0f"),
        "caption": (np.asarray(words.cast(pa.float64())), "words of a caption; 0: none", ".0f"),
    }
    return [
        Chart(
            title=title, meaning=meaning, facts=_facts(numbers, form),
            drawing=draw_histogram({"kept": numbers}, front={}, marks={}),
        )
        for title, (numbers, meaning, form) in found.items()
    ]  # fmt: skip


def column_counts(table: pa.Table) -> list[Counts]:
    """Counts of the columns with few values."""
    result = []
    for column, title in _COUNTED.items():
        if column not in table.column_names:
            continue
        counted = pc.value_counts(table[column]).to_pylist()
        entries = [(_text(entry["values"]), entry["counts"]) for entry in counted]
        entries.sort(key=lambda entry: (-entry[1], entry[0]))
        rare = entries[_MOST_BARS:]
        bars = entries[:_MOST_BARS] + ([(f"{len(rare)} others", sum(n for _, n in rare))] if rare else [])
        result.append(Counts(title=title, bars=bars))
    return result


def _text(value: object) -> str:
    if value is None or value == "":
        return "none"
    return f"{value:g}" if isinstance(value, float) else str(value)
