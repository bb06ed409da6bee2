"""Which clips of a dataset are looked at."""

import difflib
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from preprocessing.clip_table import PART, QUALITY_PREFIX, ROW, figures
from preprocessing.figures import FIGURES
from wan_accel.data.where import parse_where


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """At most `num_clips` clips of those that `where` holds for: evenly spread, or the `worst` by a figure.

    `worst`: `quality.<figure>`, or the figure alone; clips that do not have it are left out.
    """

    num_clips: int = 200
    where: str | None = None
    worst: str | None = None

    def matching(self, table: pa.Table) -> pa.Table:
        """The clips that `where` holds for, in order.

        Raises ValueError for an expression that makes no sense, or a figure that no clip has.
        """
        if self.worst is not None:
            self.figure(table)
        if self.where is None:
            return table
        columns = dict(zip(table.schema.names, table.schema.types))
        return table.filter(parse_where(self.where, columns))

    def shown(self, matching: pa.Table) -> pa.Table:
        """Those to show: the same for the same dataset."""
        if self.worst is not None:
            column = QUALITY_PREFIX + self.figure(matching)
            known = matching.filter(pc.field(column).is_valid())
            direction = "ascending" if FIGURES[self.figure(matching)].bad_end == "low" else "descending"
            return known.sort_by([(column, direction), (PART, "ascending"), (ROW, "ascending")])[: self.num_clips]
        if len(matching) <= self.num_clips:
            return matching
        return matching.take(np.linspace(0, len(matching) - 1, self.num_clips).round().astype(int))

    def figure(self, table: pa.Table) -> str:
        """The figure that `worst` names."""
        name = (self.worst or "").removeprefix(QUALITY_PREFIX)
        if name not in figures(table) or name not in FIGURES:
            near = difflib.get_close_matches(name, FIGURES, n=1)
            guess = f"did you mean {QUALITY_PREFIX}{near[0]}? " if near else ""
            raise ValueError(
                f"--worst {self.worst}: no such figure; {guess}There are "
                + ", ".join(QUALITY_PREFIX + figure for figure in figures(table))
            )
        return name
