"""Some clips of a dataset: by name, by what their columns say, evenly spread."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from preprocessing.choice import Choice
from preprocessing.clip_table import read_clip_table


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """Which clips: all that `where` describes (see `parse_where`), of `clips` where given, and `sample` of them."""

    where: str | None = None
    clips: Sequence[str] = ()
    sample: int | None = None


ALL_CLIPS = Selection()


def select(dataset: Path, selection: Selection) -> list[int]:
    """Return the row numbers of the chosen clips of a dataset, ascending; a sample is evenly spread.

    Raises:
        ValueError: an unknown clip or column, a condition that cannot be read, or nothing chosen.
    """
    if selection.sample is not None and selection.sample < 1:
        raise ValueError(f"--sample {selection.sample}: give 1 or more clips")
    table = read_clip_table(dataset)
    places = {name: row for row, name in enumerate(table["clip_id"].to_pylist())}
    chosen = _named(table, places, selection.clips) if selection.clips else table
    choice = Choice(where=selection.where, num_clips=selection.sample or len(table))
    chosen = choice.shown(choice.matching(chosen))
    if len(chosen) == 0:
        raise ValueError(f"none of the {len(table)} clips is chosen (--where {selection.where})")
    return [places[name] for name in chosen["clip_id"].to_pylist()]


def _named(table: pa.Table, places: dict[str, int], names: Sequence[str]) -> pa.Table:
    if unknown := sorted(set(names) - set(places)):
        raise ValueError(
            f"no clip is called {', '.join(unknown)}; the first of {len(places)} is {next(iter(places), None)}"
        )
    return table.filter(pc.field("clip_id").isin(list(names)))
