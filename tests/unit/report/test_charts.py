import pytest
from hypothesis import given
from hypothesis import strategies as st

from marlhf_mega.metrics.glossary import Metric, lookup
from marlhf_mega.report.charts import axis, curve, curves, histogram, stack, step_marks

FINITE = st.floats(allow_nan=False, allow_infinity=False, width=32)


@pytest.mark.parametrize(
    ("low", "high", "from_zero", "marks"),
    [
        (0.0, 1.0, True, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (27.0, 32.0, True, [0.0, 10.0, 20.0, 30.0, 40.0]),
        (27.0, 32.0, False, [27.0, 28.0, 29.0, 30.0, 31.0, 32.0]),
        (0.3, 6.3, False, [0.0, 2.0, 4.0, 6.0, 8.0]),
        (-2.1, 2.5, True, [-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0]),
        (0.0, 3e-4, False, [0.0, 5e-5, 1e-4, 1.5e-4, 2e-4, 2.5e-4, 3e-4]),
        (0.0, 0.0, True, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
    ],
)
def test_an_axis_has_round_marks_around_the_values(low, high, from_zero, marks):
    assert axis(low, high, from_zero=from_zero) == pytest.approx(marks, rel=1e-12)


def test_steps_are_marked_inside_of_the_range_by_whole_numbers():
    assert step_marks(1, 40, 6) == [10, 20, 30, 40]
    assert step_marks(0.5, 3.5, 6) == [1, 2, 3]


def test_a_learning_rate_has_short_labels_that_start_at_zero():
    drawn = curve([(1, 1e-5), (2, 5e-6), (3, 0.0)], lookup("policy/lr"))
    assert [text for _, text in drawn.frame.rows] == [
        "0",
        "0.2e-5",
        "0.4e-5",
        "0.6e-5",
        "0.8e-5",
        "1e-5",
    ]


def test_a_curve_names_each_step_and_value_and_rises_where_the_values_rise():
    drawn = curve([(0, 1.0), (10, 2.0), (20, 4.0)], lookup("policy/kl"))
    assert [p.text for p in drawn.points] == [
        "step 0: 1 nats",
        "step 10: 2 nats",
        "step 20: 4 nats",
    ]
    heights = [y for p in drawn.points for y, _ in p.dots]
    # Drawn downwards: the second step of the curve is twice the first.
    assert heights[1] - heights[2] == pytest.approx(2 * (heights[0] - heights[1]), abs=0.2)


def test_shares_are_drawn_as_per_cent():
    drawn = curve([(0, 0.05), (1, 0.125)], lookup("policy/clip_fraction"))
    assert [p.text for p in drawn.points] == ["step 0: 5 %", "step 1: 12.5 %"]


def test_a_long_curve_is_drawn_as_means_of_neighbours_with_a_running_mean():
    drawn = curve([(step, float(step)) for step in range(1000)], Metric("x"))
    assert len(drawn.points) == 100  # buckets of 10
    assert drawn.points[0].text == "step 4: 4.5"
    assert [line.style for line in drawn.lines] == ["raw", "line"]


@given(st.lists(FINITE, min_size=1, max_size=40))
def test_any_finite_values_have_a_place_in_the_frame(values):
    drawn = curve(list(enumerate(values)), Metric("x"))
    assert all(0 <= p.x <= 300 and -1 <= y <= 151 for p in drawn.points for y, _ in p.dots)


def test_stacked_bars_reach_the_sum_of_the_phases():
    drawn = stack({"rollout": [1.0, 2.0], "update": [3.0, 0.0]}, [1, 2])
    first, second = drawn.bars[:2], drawn.bars[2:]
    assert [bar.text for bar in drawn.bars] == [
        "step 1: rollout 1 s of 4 s",
        "step 1: update 3 s of 4 s",
        "step 2: rollout 2 s of 2 s",
        "step 2: update 0 s of 2 s",
    ]
    rollout, update = first
    assert update.y + update.height == pytest.approx(rollout.y, abs=0.1)
    assert update.height == pytest.approx(3 * rollout.height, abs=0.3)
    assert second[0].height == pytest.approx(2 * rollout.height, abs=0.2)
    assert rollout.x + drawn.slot < second[0].x


def test_several_curves_share_the_axes_and_say_what_each_has_at_a_step():
    series = {"b": [(1, 0.0), (2, 0.5)], "c": [(2, 1.0), (3, 0.25)]}
    drawn = curves(series, lookup("eval/accuracy"), order=["a", "b", "c"])
    assert [p.text for p in drawn.points] == [
        "step 1: b 0 %",
        "step 2: b 50 %, c 100 %",
        "step 3: c 25 %",
    ]
    assert drawn.names == [(1, "b"), (2, "c")]
    assert [(line.style, line.series) for line in drawn.lines] == [("line", 1), ("line", 2)]
    (below, _), (above, _) = drawn.points[1].dots
    assert below > above  # downwards
    assert drawn.frame.y(50) == below
    assert drawn.frame.y(100) == above


def test_a_band_is_one_standard_error_to_either_side():
    drawn = curves({"": [(1, 2.0), (2, 4.0)]}, Metric("x"), errors={"": [0.5, 1.0]})
    band = next(line for line in drawn.lines if line.style == "band")
    corners = [tuple(map(float, c.split())) for c in band.path.strip("MZ").split("L")]
    frame = drawn.frame
    assert corners == [
        (frame.x(1), frame.y(2.5)),
        (frame.x(2), frame.y(5.0)),
        (frame.x(2), frame.y(3.0)),
        (frame.x(1), frame.y(1.5)),
    ]
    assert frame.marks[0] <= 1.5
    assert frame.marks[-1] >= 5.0


def test_a_band_of_a_long_curve_is_thinned_with_it():
    points = [(step, float(step)) for step in range(1000)]
    drawn = curve(points, Metric("x"), [1.0] * 1000)
    assert [line.style for line in drawn.lines] == ["band", "raw", "line"]
    assert drawn.lines[0].path.count("L") == 2 * len(drawn.points) - 1


def test_a_histogram_has_a_bar_of_the_share_of_each_number():
    drawn = histogram({2: 1, 5: 3}, unit="things", axis_label="tokens")
    assert [bar.text for bar in drawn.bars] == [
        "2 tokens: 1 things, 25.0 %",
        "5 tokens: 3 things, 75.0 %",
    ]
    few, many = drawn.bars
    assert many.height == pytest.approx(3 * few.height, abs=0.3)
    assert few.x + drawn.slot / 2 == pytest.approx(drawn.frame.x(2), abs=0.2)
    assert many.x + drawn.slot / 2 == pytest.approx(drawn.frame.x(5), abs=0.2)
