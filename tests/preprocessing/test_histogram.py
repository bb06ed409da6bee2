import re

import numpy as np
import pytest

from preprocessing.histogram import HEIGHT, WIDTH, bin_edges, count_bins, draw_histogram

NOTHING = {"front": {}, "marks": {}}


def bars(path: str) -> list[tuple[float, float, float, float]]:
    """Left, bottom, height and width of the bars of a path."""
    found = re.findall(r"M([\d.]+) ([\d.]+)v-([\d.]+)h([\d.]+)v[\d.]+z", path)
    assert "".join(f"M{a} {b}v-{c}h{d}v{c}z" for a, b, c, d in found) == path
    return [tuple(map(float, bar)) for bar in found]


def test_bins_span_nearly_all_values_and_the_outermost_hold_the_rest():
    values = np.concatenate([np.linspace(0, 1, 10_000), [50.0]])
    edges = bin_edges(values)
    assert len(edges) == 41 and 0 <= edges[0] < 0.01 and 0.99 < edges[-1] < 1.01
    counts = count_bins(values, edges)
    assert counts.sum() == 10_001 and counts[-1] == pytest.approx(251 + 10, abs=12)


def test_few_whole_numbers_get_a_bin_each():
    edges = bin_edges(np.array([0.0, 0, 2, 3]))
    assert edges.tolist() == [-0.5, 0.5, 1.5, 2.5, 3.5]
    assert count_bins(np.array([0.0, 0, 2, 3]), edges).tolist() == [2, 0, 1, 1]


@pytest.mark.parametrize("values", [[0.25], [1e-12] * 3, [1e9 + 0.5] * 2, [7.0], []])
def test_equal_values_and_none_have_an_axis(values):
    edges = bin_edges(np.array(values))
    assert (np.diff(edges) > 0).all() and count_bins(np.array(values), edges).sum() == len(values)


def test_marks_stay_on_the_axis():
    edges = bin_edges(np.array([0.5, 0.6]), [0.1, 0.9])
    assert (edges[0], edges[-1]) == (0.1, 0.9)


def test_bars_are_as_high_as_they_are_many_and_stand_on_each_other():
    drawing = draw_histogram({"kept": np.array([0.0, 0, 0, 1]), "lost": np.array([1.0])}, **NOTHING)
    first, second = bars(drawing.bars["kept"])
    (lost,) = bars(drawing.bars["lost"])
    assert drawing.most == 3 and first[2] == pytest.approx(3 * second[2], abs=0.2)
    assert lost[0] == second[0] and lost[1] == pytest.approx(second[1] - second[2], abs=0.2)
    for left, bottom, height, width in (first, second, lost):
        assert left >= 0 and left + width <= WIDTH and bottom - height >= 0 and bottom <= HEIGHT
    assert [tick.text for tick in drawing.ticks] == ["0", "1"]


def test_one_value_among_a_million_is_seen():
    drawing = draw_histogram({"kept": np.concatenate([np.zeros(1_000_000), np.full(2_000, 0.5)])}, **NOTHING)
    assert min(bar[2] for bar in bars(drawing.bars["kept"])) >= 1.5


def test_texts_stay_inside():
    drawing = draw_histogram(
        {"kept": np.linspace(0.00123, 1, 500)}, front={"matching": np.array([0.5])}, marks={"min 0.00123": 0.00123}
    )
    assert list(drawing.bars) == ["kept", "matching"]
    for label in (*drawing.marks, *drawing.ticks):
        half = 3 * len(label.text)
        assert half <= label.text_x <= WIDTH - half
    assert drawing.marks[0].x < drawing.marks[0].text_x
