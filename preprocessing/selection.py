"""Some clips of a dataset: by name, by what their columns say, by chance."""

import ast
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from datasets import Dataset

_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}  # fmt: skip
_HOW = "write COLUMN == VALUE, also with != < <= > >=, joined by `and`, `or`: `quality.face_size >= 64 and fps == 30`"
_SAMPLE_SEED = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """Which clips: all that `where` describes, of `clips` where given, and `sample` of them where given."""

    where: str | None = None
    clips: Sequence[str] = ()
    sample: int | None = None


ALL_CLIPS = Selection()


def select(dataset: "Dataset", selection: Selection) -> list[int]:
    """Return the row numbers of the chosen clips, ascending. The same sample is drawn each time.

    Raises:
        ValueError: an unknown clip or column, a condition that cannot be read, or nothing chosen.
    """
    chosen = np.ones(len(dataset), bool)
    if selection.clips:
        chosen &= _named(dataset, selection.clips)
    if selection.where is not None:
        chosen &= _satisfying(dataset, _parse(selection.where))
    rows = np.flatnonzero(chosen)
    if selection.sample is not None:
        if selection.sample < 1:
            raise ValueError(f"--sample {selection.sample}: give 1 or more clips")
        count = min(selection.sample, len(rows))
        rows = np.sort(np.random.default_rng(_SAMPLE_SEED).choice(rows, count, replace=False))
    if len(rows) == 0:
        raise ValueError(f"none of the {len(dataset)} clips is chosen (--where {selection.where})")
    return [int(row) for row in rows]


def _named(dataset: "Dataset", names: Sequence[str]) -> np.ndarray:
    there = dataset.data.column("clip_id").to_pylist()
    if unknown := sorted(set(names) - set(there)):
        raise ValueError(f"no clip is called {', '.join(unknown)}; the first of {len(there)} is {there[0]}")
    return np.isin(np.array(there), list(names))


def _parse(where: str) -> ast.expr:
    """Read a condition as the expression that it is in Python, of which only comparisons are understood."""
    try:
        return ast.parse(where.strip(), mode="eval").body
    except SyntaxError:
        raise ValueError(f"--where {where!r} is no condition: {_HOW}") from None


def _satisfying(dataset: "Dataset", node: ast.expr) -> np.ndarray:
    """(N,) bool: the rows for which a condition holds."""
    if isinstance(node, ast.BoolOp):
        parts = [_satisfying(dataset, part) for part in node.values]
        return np.all(parts, axis=0) if isinstance(node.op, ast.And) else np.any(parts, axis=0)
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in _COMPARISONS:
        column, value = ast.unparse(node.left), _value(node.comparators[0])
        if value is not None:
            values, compare = _values(dataset, column), _COMPARISONS[type(node.ops[0])]
            _check_kind(column, values, value)
            return np.array([_holds(compare, found, value) for found in values], bool)
    raise ValueError(f"--where: `{ast.unparse(node)}` is no condition: {_HOW}")


def _value(node: ast.expr) -> str | int | float | None:
    """A number, or a text with or without quotes; None for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    try:
        value = ast.literal_eval(node)
    except ValueError:
        return None
    return value if isinstance(value, (str, int, float)) else None


def _values(dataset: "Dataset", column: str) -> list[Any]:
    """A column's values, or those of a part of it: `quality.blur`."""
    name, *inside = column.split(".")
    comparable = [n for n in dataset.column_names if not _is_bulky(dataset.features[n])]
    if name not in comparable:
        raise ValueError(f"--where {column}: there is no such column; use {', '.join(comparable)}")
    feature, values = dataset.features[name], dataset.data.column(name).to_pylist()
    for key in inside:
        if not isinstance(feature, dict) or key not in feature:
            parts = ", ".join(f"{name}.{part}" for part in feature) if isinstance(feature, dict) else name
            raise ValueError(f"--where {column}: {name} has no {key}; use {parts}")
        feature, values = feature[key], [value and value[key] for value in values]
    if isinstance(feature, dict):
        raise ValueError(f"--where {column}: name one of its parts, such as {column}.{next(iter(feature))}")
    return values


def _is_bulky(feature: Any) -> bool:
    """Videos, pictures, masks and arrays: nothing to compare with a word or a number."""
    from datasets import Value

    return type(feature).__name__ in ("Video", "Image", "Array2D", "Array3D") or feature == Value("binary")


def _check_kind(column: str, values: list[Any], wanted: str | int | float) -> None:
    found = next((part for value in values for part in (value if isinstance(value, list) else [value])), None)
    if found is not None and isinstance(found, str) != isinstance(wanted, str):
        kind = "texts" if isinstance(found, str) else "numbers"
        raise ValueError(f"--where {column}: it holds {kind}, and {wanted!r} is none: {_HOW}")


def _holds(compare: Callable[[Any, Any], Any], value: Any, wanted: Any) -> bool:
    """Whether a value satisfies a condition; one that is absent satisfies none, one of several (modes) is enough."""
    if value is None:
        return False
    if isinstance(value, list):
        return any(compare(part, wanted) for part in value)
    return bool(compare(value, wanted))
