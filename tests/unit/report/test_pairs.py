"""The chart and the tables of held-out pairs."""

from marlhf_mega.report.pairs import calibration_chart, pair_tables
from tests.unit.metrics.test_pairs import odds, pair


def test_the_chart_shows_what_is_right_beside_the_diagonal():
    chart = calibration_chart([pair(odds(0.62)), pair(-odds(0.62)), pair(odds(0.8))])
    assert [point.text for point in chart.points] == [
        "conf. % 62: right 50 %, confidence 62 %",
        "conf. % 80: right 100 %, confidence 80 %",
    ]
    assert calibration_chart([pair(0.1), pair(0.2)]) is None
    assert calibration_chart([]) is None


def test_tables_leave_out_what_all_pairs_share():
    pairs = [pair(1.0, margin=1.0, tokens=(8, 2)), pair(-1.0, margin=2.0, tokens=(6, 4))]
    margins, lengths = pair_tables(pairs)
    assert margins == (
        ("margin of the data", "accuracy (%)", "pairs"),
        [("1", "100", "1"), ("2", "0", "1")],
    )
    assert lengths[0] == ("tokens", "mean score", "responses")
    assert [row[:2] for row in lengths[1]] == [("2", "0"), ("4", "0"), ("6", "-1"), ("8", "1")]
    assert pair_tables([pair(1.0), pair(2.0)]) == pair_tables([]) == []
