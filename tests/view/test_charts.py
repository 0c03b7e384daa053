"""Charts: what is drawn is where the numbers are."""

from xml.etree import ElementTree

import pytest

from loopmdm.view.charts import Axis, Point, Series, bars, chart, number


def drawn(text):
    return ElementTree.fromstring(text)


def centres(picture, kind):
    return [
        (float(c.get("cx")), float(c.get("cy"))) for c in picture.iter("circle") if c.get("class") == kind
    ]


def test_points_lie_by_their_values():
    series = [Series("a", [Point(0, 0), Point(1, 5), Point(2, 10)]), Series("b", [Point(0, 2)])]
    picture = drawn(chart(series, x="x", y="y", title="t"))
    (x0, y0), (x1, y1), (x2, y2), _ = centres(picture, "m0")  # the last is the legend's
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2) and y0 - y1 == pytest.approx(y1 - y2, abs=0.2)
    assert x0 < x1 and y0 > y1  # up is more
    texts = [text.text for text in picture.iter("text")]
    assert {"a", "b", "x", "y"} <= set(texts)


def test_equal_factors_are_equal_steps_where_the_axis_is_logarithmic():
    picture = drawn(
        chart(
            [Series("a", [Point(1, 1), Point(10, 10), Point(100, 100)])],
            x="",
            y="",
            x_log=True,
            y_log=True,
            title="",
        )
    )
    (x0, y0), (x1, y1), (x2, y2), _ = centres(picture, "m0")
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2) and y0 - y1 == pytest.approx(y1 - y2, abs=0.2)


def test_intervals_reach_from_end_to_end():
    picture = drawn(chart([Series("a", [Point(1, 5, 4, 8), Point(2, 5, 5, 5)])], x="", y="", title=""))
    first, second = (line for line in picture.iter("line") if line.get("class") == "s0")
    assert float(first.get("y1")) - float(first.get("y2")) > 20
    assert first.get("x1") == first.get("x2") and second.get("y1") == second.get("y2")


def test_names_are_escaped():
    picture = drawn(chart([Series("<b>", [Point(1, 1, label="&")])], x="<", y=">", title='"'))
    assert "<b>" in [text.text for text in picture.iter("text")] and picture.get("aria-label") == '"'


def test_bars_stand_on_their_side_of_one():
    rows = [("op", [("slow", Point(0.5, 0, 0.4, 0.6)), ("fast", Point(2.0, 0, 1.8, 2.2))])]
    picture = drawn(bars(rows, x="times", one=1.0, title="t"))
    (one,) = (float(line.get("x1")) for line in picture.iter("line") if line.get("class") == "axis")
    slow, fast = (
        next(float(line.get("x2")) for line in picture.iter("line") if line.get("class") == kind)
        for kind in ("s0", "s1")
    )
    assert slow < one < fast


@pytest.mark.parametrize(
    ("low", "high", "log", "ticks"),
    [
        (0, 10, False, [0, 5, 10]),
        (0, 0.9, False, [0, 0.5]),
        (1, 1000, True, [1, 10, 100, 1000]),
        (1, 12, True, [1, 2, 5, 10]),
    ],
)
def test_ticks_are_round(low, high, log, ticks):
    assert Axis(low, high, 0, 1, log).ticks() == pytest.approx(ticks)


def test_numbers_are_short():
    assert [number(v) for v in (0, 0.5, 12, 1234, 2e-7, 3e6)] == ["0", "0.5", "12", "1234", "2e-7", "3e6"]
