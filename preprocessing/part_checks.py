"""Check a part of a clips dataset: its file against its sidecar, its columns, and which of its batches can be read."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from preprocessing.clip_checks import check_clip
from wan_accel.data import store
from wan_accel.data.schema import clips_features

_DISTRUST = (
    "none of its clips can be trusted; copy it again, or remove it with its sidecar and run the command that made it"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """What is wrong and where: part (relative to the dataset), row in it, clip and column, as far as they are known."""

    part: str
    message: str
    row: int | None = None
    clip_id: str | None = None
    column: str | None = None

    def __str__(self) -> str:
        if self.row is None:
            return f"{self.part}: {self.message}"
        column = f": {self.column}" if self.column else ""
        return f"clip {self.clip_id} ({self.part}, row {self.row}){column} {self.message}"


@dataclass(frozen=True, kw_only=True, slots=True)
class PartFindings:
    """What is wrong with a part as a whole, and its batches that can be read: number, first row, rows of each."""

    problems: list[str]
    batches: list[tuple[int, int, int]] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """Some batches of a part, to be checked row by row (for each: number, first row, rows), or one row of them."""

    root: Path
    part: Path
    batches: tuple[tuple[int, int, int], ...]
    only: int | None = None

    @property
    def part_name(self) -> str:
        """The part, relative to the dataset."""
        return str(self.part.relative_to(self.root))

    @property
    def numbers(self) -> list[int]:
        """Rows of the part that are meant."""
        if self.only is not None:
            return [self.only]
        return [row for _, first, count in self.batches for row in range(first, first + count)]


@dataclass(frozen=True, kw_only=True, slots=True)
class RowFindings:
    """Clip ids by row of the part, and the problems of these clips."""

    clip_ids: dict[int, str]
    problems: list[Problem]


def check_part(part: Path) -> PartFindings:
    """Check size, hash, number of rows and columns. A damaged part is read as far as it goes."""
    try:
        problem = store.part_problem(part, store.read_sidecar(part))
    except store.StoreError:
        problem = "its sidecar is damaged"
    except (pa.ArrowException, OSError) as error:
        problem = f"cannot be read ({_line(error)})"
    problems = [] if problem is None else [f"{problem}: {_DISTRUST}"]
    if not part.is_file():
        return PartFindings(problems=problems)
    batches, first_row = [], 0
    try:
        problems += _wrong_columns(part)
        for number, batch in enumerate(store.batches(part)):
            rows = range(first_row, first_row + batch.num_rows)
            first_row = rows.stop
            try:
                batch.validate(full=True)
                batches.append((number, rows.start, len(rows)))
            except pa.ArrowException as error:
                problems.append(f"rows {rows.start} to {rows.stop - 1} cannot be read ({_line(error)})")
    except Exception as error:  # a damaged header raises whatever its reader stumbles over
        problems.append(f"cannot be read beyond row {first_row} ({_line(error)})")
    return PartFindings(problems=problems, batches=batches)


def _wrong_columns(part: Path) -> list[str]:
    from datasets import Features

    with pa.memory_map(str(part)) as source:
        found = Features.from_arrow_schema(pa.ipc.open_stream(source).schema)
    expected = clips_features(animate="reference" in found)
    problems = [f"has no column {name}" for name in expected if name not in found]
    problems += [f"has a column {name}, which this version does not know" for name in found if name not in expected]
    # The figures of quality may be fewer than today's: each clip is asked which it has.
    return problems + [
        f"column {name} is {found[name]}, expected {kind}"
        for name, kind in expected.items()
        if name in found and found[name] != kind and name != "quality"
    ]


def check_rows(rows: Rows) -> RowFindings:
    """Check every clip of some batches."""
    names, problems = {}, []
    for index, row in _rows(rows):
        names[index] = str(row.get("clip_id") or "")
        try:
            findings = check_clip(row)
        except KeyError:  # the part lacks a column, which its own problem says
            continue
        problems += [
            Problem(part=rows.part_name, row=index, clip_id=names[index], column=column, message=message)
            for column, message in findings
        ]
    return RowFindings(clip_ids=names, problems=problems)


def clip_ids(rows: Rows) -> dict[int, str]:
    """Clip ids by row of the part; nothing is decoded."""
    return {index: str(row.get("clip_id") or "") for index, row in _rows(rows)}


def _rows(rows: Rows) -> Iterator[tuple[int, dict[str, Any]]]:
    wanted = {number: first for number, first, _ in rows.batches}
    for number, batch in enumerate(store.batches(rows.part)):
        if number in wanted:
            for index in range(batch.num_rows):
                if rows.only in (None, wanted[number] + index):
                    yield wanted[number] + index, store.plain_row(batch, index)
        if number >= max(wanted):
            return


def _line(error: Exception) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__
