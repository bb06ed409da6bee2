"""The HTML report of a clips dataset: what it holds, what was turned down, and some clips to look at."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path

import numpy as np
import pyarrow as pa

from preprocessing.cards import Card
from preprocessing.charts import column_counts, quality_charts, source_charts, violates
from preprocessing.choice import Choice
from preprocessing.clip_table import QUALITY_PREFIX, figures, values
from preprocessing.figures import FIGURES
from preprocessing.histogram import HEIGHT, WIDTH
from preprocessing.rejections import Rejections
from preprocessing.thresholds import Bound, load_bounds
from wan_accel.data import store


@dataclass(frozen=True, kw_only=True, slots=True)
class Bounds:
    """Bounds to draw, and where they are from in words."""

    by_figure: Mapping[str, Bound]
    origin: str


def bounds_to_draw(dataset: Path, file: Path | None) -> Bounds:
    """Those of a file, else those that the run had; datasets that do not say (merged ones) get the package's."""
    if file is not None:
        return Bounds(by_figure=load_bounds(file), origin=file.name)
    run = dataset / store.RUN_FILE
    settings = json.loads(run.read_text())["settings"] if run.is_file() else {}
    if "quality" in settings:
        found = {name: Bound(**bound) for name, bound in settings["quality"].items()}
        return Bounds(by_figure=found, origin="the run that made the clips" if found else "")
    return Bounds(by_figure=load_bounds(None), origin="wan-preprocess (the dataset does not name its own)")


def render(
    dataset: Path,
    *,
    table: pa.Table,
    matching: pa.Table,
    cards: Sequence[Card],
    choice: Choice,
    rejections: Rejections,
    bounds: Bounds,
) -> str:
    """The page; texts of the dataset are escaped, and nothing in it is fetched from elsewhere."""
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    environment = Environment(
        loader=FunctionLoader(lambda name: (files("preprocessing") / name).read_text(encoding="utf-8")),
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined,
    )  # fmt: skip
    environment.filters["count"] = lambda number: f"{number:,}"
    violating = [
        violates(table, QUALITY_PREFIX + name, bound)
        for name, bound in bounds.by_figure.items()
        if name in figures(table)
    ]
    return environment.get_template("report.html.jinja").render(
        name=dataset.resolve().name,
        written=_written(dataset),
        facts=_facts(table, rejections),
        quality=quality_charts(table, matching, rejections.quality, bounds.by_figure),
        sources=source_charts(table) if len(table) else [],
        counts=column_counts(table),
        bounds=bounds,
        num_outside=int(np.any(violating, axis=0).sum()) if violating else 0,
        rejections=rejections,
        choice=choice,
        num_clips=len(table),
        num_matching=len(matching),
        cards=cards,
        sortable=[(name, FIGURES[name]) for name in figures(table) if name in FIGURES],
        width=WIDTH,
        height=HEIGHT,
    )


def _written(dataset: Path) -> str:
    return datetime.fromtimestamp((dataset / "state.json").stat().st_mtime, UTC).strftime("%Y-%m-%d %H:%M UTC")


def _facts(table: pa.Table, rejections: Rejections) -> list[tuple[str, str]]:
    sources = len(table["source.sha256"].unique())
    tracks = len(
        table.select(["source.sha256", "source.track"]).group_by(["source.sha256", "source.track"]).aggregate([])
    )
    facts = [
        ("clips", f"{len(table):,}"), _duration(values(table, "seconds").sum()),
        ("videos with clips", f"{sources:,}"), ("tracks in them", f"{tracks:,}"),
    ]  # fmt: skip
    if rejections.num_videos:
        facts.append(("videos worked on", f"{rejections.num_videos:,}"))
    return [
        *facts,
        ("videos turned down", f"{rejections.num_videos_rejected:,}"),
        ("clips turned down", f"{rejections.num_clips_rejected:,}"),
    ]


def _duration(seconds: float) -> tuple[str, str]:
    for unit, length in (("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return unit, f"{seconds / length:,.1f}"
    return "seconds", f"{seconds:,.1f}"
