"""Histograms of figures over all clips, as numbers and as the shapes of a small drawing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

WIDTH, HEIGHT = 320, 132
_LEFT, _RIGHT, _TOP, _BASE = 10, WIDTH - 10, 18, HEIGHT - 20
_NUM_BINS = 40
_TAIL = 0.001  # share of the values at either end that may lie beyond the axis, in its outermost bars
_LEAST_BAR, _WIDEST_BAR = 1.5, 36.0  # one clip of a million is seen too
_LETTER_WIDTH, _MOST_TICKS = 6.5, 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Label:
    """A place on the axis, and the centre of its text, which stays inside the box."""

    x: float
    text_x: float
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawing:
    """Shapes in a box of WIDTH x HEIGHT: bars by kind (an SVG path each), ticks and marks; count of the highest bar."""

    bars: dict[str, str]
    ticks: list[Label]
    marks: list[Label]
    most: int


def draw_histogram(
    stacked: Mapping[str, np.ndarray], *, front: Mapping[str, np.ndarray], marks: Mapping[str, float]
) -> Drawing:
    """Draw the distribution of values.

    Args:
        stacked: values by kind, one kind on top of the other.
        front: values by kind that are part of the first of `stacked`, drawn over it.
        marks: places on the axis by their text, kept on it.
    """
    edges = bin_edges(np.concatenate(list(stacked.values())), list(marks.values()))
    counts = {kind: count_bins(values, edges) for kind, values in {**stacked, **front}.items()}
    most = max(1, int(np.sum([counts[kind] for kind in stacked], axis=0).max()))
    bars, below = {}, np.zeros(len(edges) - 1, int)
    for kind in stacked:
        bars[kind] = _path(below, counts[kind], most)
        below = below + counts[kind]
    bars |= {kind: _path(np.zeros_like(below), counts[kind], most) for kind in front}
    ticks = [_label(tick, f"{tick:.6g}", edges) for tick in _ticks(edges)]
    return Drawing(bars=bars, ticks=ticks, marks=[_label(at, text, edges) for text, at in marks.items()], most=most)


def bin_edges(values: np.ndarray, marks: Sequence[float] = ()) -> np.ndarray:
    """Edges of equal bins: one a whole number where there are few of them, else about 40 over nearly all values."""
    if len(values) == 0:
        return np.array([0.0, 1.0])
    low, high = np.quantile(values, [_TAIL, 1 - _TAIL])
    low, high = min(low, *marks, high), max(high, *marks, low)
    if np.array_equal(values, np.round(values)) and high - low < _NUM_BINS:
        return np.arange(np.floor(low) - 0.5, np.ceil(high) + 1.5)
    if high - low < 1e-9 * max(1.0, abs(low)):
        low, high = low - 0.5, high + 0.5
    return np.linspace(low, high, _NUM_BINS + 1)


def count_bins(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Values in each bin; what lies beyond the edges counts in the outermost bins."""
    return np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0]


def _path(below: np.ndarray, counts: np.ndarray, most: int) -> str:
    """Bars from the counts below on, as one path."""
    room = (_RIGHT - _LEFT) / len(counts)
    width = min(max(room - 1, 1), _WIDEST_BAR)
    scale = (_BASE - _TOP) / most
    pieces = []
    for number in np.flatnonzero(counts):
        bottom = _BASE - below[number] * scale
        height = max(counts[number] * scale, _LEAST_BAR)
        left = _LEFT + (number + 0.5) * room - width / 2
        pieces.append(f"M{left:.1f} {bottom:.1f}v-{height:.1f}h{width:.1f}v{height:.1f}z")
    return "".join(pieces)


def _ticks(edges: np.ndarray) -> list[float]:
    from matplotlib.ticker import MaxNLocator

    if edges[1] - edges[0] == 1 and edges[0] % 1 == 0.5:  # a bin a whole number
        whole = np.arange(edges[0] + 0.5, edges[-1])
        return whole[:: -(-len(whole) // _MOST_TICKS)].tolist()
    places = MaxNLocator(nbins=_MOST_TICKS - 1, steps=[1, 2, 2.5, 5, 10]).tick_values(edges[0], edges[-1])
    return [float(place) for place in places if edges[0] <= place <= edges[-1]]


def _label(value: float, text: str, edges: np.ndarray) -> Label:
    x = round(float(_LEFT + (value - edges[0]) / (edges[-1] - edges[0]) * (_RIGHT - _LEFT)), 1)
    margin = _LETTER_WIDTH / 2 * len(text)
    return Label(x=x, text_x=min(max(x, margin), WIDTH - margin), text=text)
