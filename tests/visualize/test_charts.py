"""Charts by hand: the plot is 58 to 438 pixels across and 210 up to 34; everything drawn is counted and measured."""

import re

import pytest

from beit_fast.visualize import charts
from beit_fast.visualize.charts import Series, line_chart, number

BOTH = """
<figure><svg class="chart" viewBox="0 0 460 250" role="img" aria-label="a &lt;b&gt;">
<text class="title" x="58" y="18">a &lt;b&gt;</text>
<line class="grid" x1="58" x2="438" y1="210.0" y2="210.0"/><text x="52" y="214.0" text-anchor="end">0</text>
<line class="grid" x1="58" x2="438" y1="143.6" y2="143.6"/><text x="52" y="147.6" text-anchor="end">2</text>
<line class="grid" x1="58" x2="438" y1="77.2" y2="77.2"/><text x="52" y="81.2" text-anchor="end">4</text>
<text x="58.0" y="225" text-anchor="middle">0</text><text x="134.0" y="225" text-anchor="middle">2</text>
<text x="210.0" y="225" text-anchor="middle">4</text><text x="286.0" y="225" text-anchor="middle">6</text>
<text x="362.0" y="225" text-anchor="middle">8</text><text x="438.0" y="225" text-anchor="middle">10</text>
<text x="248.0" y="243" text-anchor="middle">optimizer step</text>
<polyline class="s0" points="58.0,210.0 248.0,127.0 438.0,44.0 438.0,44.0"/>
<circle class="d0" cx="58.0" cy="210.0" r="2.4"/><circle class="d0" cx="248.0" cy="127.0" r="2.4"/>
<circle class="d0" cx="438.0" cy="44.0" r="2.4"/><polyline class="s1 dashed" points="438.0,77.2 438.0,77.2"/>
<g class="at"><rect class="hit" x="58.0" y="34" width="95.0" height="176"/><g class="values">
<line x1="58.0" x2="58.0" y1="34" y2="210"/><circle class="d0" cx="58.0" cy="210.0" r="2.4"/>
<rect x="66.0" y="34" width="109" height="36" rx="4"/><text x="71.0" y="49">optimizer step 0</text>
<text x="71.0" y="64">one &amp; two: 0</text></g></g>
<g class="at"><rect class="hit" x="153.0" y="34" width="190.0" height="176"/><g class="values">
<line x1="248.0" x2="248.0" y1="34" y2="210"/><circle class="d0" cx="248.0" cy="127.0" r="2.4"/>
<rect x="130.8" y="34" width="109" height="36" rx="4"/><text x="135.8" y="49">optimizer step 5</text>
<text x="135.8" y="64">one &amp; two: 2.5</text></g></g>
<g class="at"><rect class="hit" x="343.0" y="34" width="95.0" height="176"/><g class="values">
<line x1="438.0" x2="438.0" y1="34" y2="210"/><circle class="d0" cx="438.0" cy="44.0" r="2.4"/>
<circle class="d1" cx="438.0" cy="77.2" r="2.4"/><rect x="314.6" y="34" width="115" height="51" rx="4"/>
<text x="319.6" y="49">optimizer step 10</text><text x="319.6" y="64">one &amp; two: 5</text>
<text x="319.6" y="79">ref: 4</text></g></g></svg>
<figcaption><span><b class="key0">━</b> one &amp; two <i>5</i></span> <span><b class="key1">┄</b> ref <i>4</i></span>
</figcaption></figure>
"""


def test_a_chart_to_the_last_pixel():
    """From zero to 5 and 6 % above: a height of 2.5 is 176 x 2.5 / 5.3 pixels; 6.2 pixels a letter under the mouse."""
    chart = line_chart(
        "a <b>", [Series("one & two", [0, 5, 10], [0.0, 2.5, 5.0]), Series("ref", [10], [4.0], True)], from_zero=True
    )
    assert chart == BOTH.replace("\n", "")


def elements(chart, tag):
    """The numbers of each element's attributes, in their order."""
    return [[float(n) for n in re.findall(r'"(-?[\d.]+)"', found)] for found in re.findall(f"<{tag} [^>]*>", chart)]


def points_of(chart):
    return [
        [tuple(map(float, point.split(","))) for point in line.split()] for line in re.findall(r'points="(.*?)"', chart)
    ]


def labels(chart, anchor):
    return re.findall(rf'text-anchor="{anchor}">(.*?)<', chart)


def test_logarithmic_axes():
    """Whole powers of ten; what is 0 or missing is left out."""
    series = [Series("s", [1, 10, 0, 100], [0.5, None, 0.3, 2e-3]), Series("t", [1000], [0.0])]
    chart = line_chart("log", series, "rank", log_x=True, log_y=True)
    assert points_of(chart) == [[(58.0, 51.7), (438.0, 192.3), (438.0, 192.3)]]
    assert labels(chart, "end") == ["0.001", "0.01", "0.1", "1"]
    assert labels(chart, "middle") == ["1", "10", "100", "rank"]
    assert [line[2] for line in elements(chart, 'line class="grid"')] == [210.0, 151.3, 92.7, 34.0]
    one = line_chart("one", [Series("s", [1], [10.0])], log_x=True, log_y=True, from_zero=True)
    assert points_of(one) == [[(58.0, 210.0)] * 2]
    assert (labels(one, "end"), labels(one, "middle")) == (["10", "100"], ["1", "10", "optimizer step"])


@pytest.mark.parametrize(
    ("values", "options", "low", "high", "ticks"),
    [
        ([10.0, 20.0], {"margins": (0.0, 0.0)}, 10, 20, [10, 12, 14, 16, 18, 20]),
        ([10.0, 20.0], {"margins": (0.1, 0.2)}, 9, 22, [10, 15, 20]),
        ([10.0, 20.0], {"margins": (0.05, 0.15)}, 9.5, 21.5, [10, 12.5, 15, 17.5, 20]),
        ([0.0, 5.0], {}, 0, 5, [0, 1, 2, 3, 4, 5]),
        ([0.0, 40.0], {}, 0, 40, [0, 10, 20, 30, 40]),
        ([0.0, 1.0], {}, 0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        ([0.0, 20.0], {}, 0, 20, [0, 5, 10, 15, 20]),
        ([-4.0, -4.0], {}, -6, -2, [-6, -5, -4, -3, -2]),
        ([0.0, 0.0], {}, 0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        ([100.0, 102.0], {"span": 0.1}, 95.9, 106.1, [97.5, 100, 102.5, 105]),
        ([-100.0, -98.0], {"span": 0.1}, -104, -94, [-104, -102, -100, -98, -96, -94]),
        ([100.0, 120.0], {"span": 0.1, "margins": (0.05, 0.1)}, 99, 122, [100, 105, 110, 115, 120]),
    ],
)
def test_axes_by_hand(values, options, low, high, ticks):
    """Least and largest value, margins in shares of their distance, at least `span` of the larger; about five ticks."""
    axis = charts._Axis(values, False, 100, 300, **options)
    assert (axis.low, axis.high) == pytest.approx((low, high))
    assert axis.ticks() == pytest.approx(ticks)
    assert [axis.pixel(v) for v in (low, (low + high) / 2, high)] == pytest.approx([100, 200, 300])


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"), (1.5e-3, "0.0015"), (1e-4, "0.0001"), (9.94e-5, "9.9e-05"), (-5e-5, "-5.0e-05"), (0.12345, "0.1235"),
        (3.25, "3.25"), (999, "999"), (999.5, "999.5"), (1000, "1,000"), (-1200, "-1,200"),
        (99_999, "99,999"), (100_000, "100k"),
        (160_450, "160.4k"), (999_900, "999.9k"), (999_999.5, "1000k"),
        (1_000_000, "1M"), (-1_234_567, "-1.23M"),
    ],
)  # fmt: skip
def test_numbers_are_short(value, text):
    assert number(value) == text


def test_long_lines_are_thinned():
    """Every other of 1,003 points, of which 59 have a column, and the last; dots on 40 points at the most."""
    chart = line_chart("x", [Series("long", list(range(1003)), [1.0] * 1002 + [2.0])])
    ((*points, last),) = points_of(chart)
    assert [round((x - 58) * 1002 / 380) for x, _ in points] == list(range(0, 1003, 2))
    assert last[0] == 438.0
    shown = [int(step.replace(",", "")) for step in re.findall(r"optimizer step ([\d,]+)<", chart)]
    assert shown == [*range(0, 1003, 17), 1002]
    assert "<circle" not in re.sub(r'<g class="at">.*', "", chart)
    for count, dashed, dots in ((40, False, 40), (41, False, 0), (40, True, 0)):
        chart = line_chart("x", [Series("s", list(range(count)), [1.0] * count, dashed)])
        assert re.sub(r'<g class="at">.*', "", chart).count("<circle") == dots
    columns = {
        count: line_chart("x", [Series("s", list(range(count)), [1.0] * count)]) for count in (60, 61, 500, 999, 1000)
    }
    assert [chart.count('class="at"') for chart in columns.values()] == [60, 31, 57, 60, 60]
    assert [len(points_of(chart)[0]) for chart in columns.values()] == [61, 62, 501, 1000, 501]


def test_seven_lines_have_six_colours_and_the_seventh_is_dashed():
    chart = line_chart("x", [Series(f"s{n}", [0, 1], [float(n), n + 1.0]) for n in range(7)])
    kinds = ["s0", "s1", "s2", "s3", "s4", "s5", "s0 dashed"]
    assert re.findall(r'<polyline class="(.*?)"', chart) == kinds
    assert re.findall(r'<b class="(.*?)">(.)', chart) == [*((f"key{n}", "━") for n in range(6)), ("key0", "┄")]
    assert re.findall(r'<circle class="(.*?)"', chart)[-7:] == ["d0", "d1", "d2", "d3", "d4", "d5", "d0"]


def test_a_line_that_hardly_changes_has_an_axis_of_5_percent():
    """663 to 665 is less than 5 % of 665, 33.25: 15.6 more on both sides, and 6 % of the 2 themselves."""
    chart = line_chart("x", [Series("s", [0, 1], [663.0, 665.0])])
    low, high = 663 - 15.625 - 0.12, 665 + 15.625 + 0.12
    expected = [(x, round(210 - 176 * (y - low) / (high - low), 1)) for x, y in ((58.0, 663), (438.0, 665))]
    assert points_of(chart) == [[*expected, expected[1]]]


def test_from_zero_begins_at_zero():
    chart = line_chart("x", [Series("s", [0, 4, 10], [2.0, 4.0, 4.0])], from_zero=True)
    assert points_of(chart)[0][:2] == [(58.0, round(210 - 176 * 2 / 4.24, 1)), (210.0, round(210 - 176 * 4 / 4.24, 1))]
    assert [box[0] for box in elements(chart, "rect")[1::2]] == [66.0, 218.0, 314.6]  # beside the point, inside
    with pytest.raises(ValueError):
        line_chart("x", [Series("s", [0, 1], [1.0])])
