"""Pictures of macro actions, by hand."""

from marlhf_mega.report.macro_actions import length_chart, position_charts


def line(step, lengths, *positions):
    names = ("advantage", "value", "kl", "advantage_stderr")
    return {
        "step": step,
        "lengths": lengths,
        "positions": [
            {"count": 4, **dict(zip(names, values, strict=False))} for values in positions
        ],
    }


LINES = [
    line(1, {"5": 9}, (0.5, 1.0, 0.0, 0.25), (-0.5, 2.0, 0.0, 0.25)),
    line(11, {"5": 3}),  # no response had a score
    line(21, {"2": 1, "5": 3}, (1.0, 1.0, 0.125, 0.25), (-1.0, 1.5, 0.25)),
]


def test_lengths_are_shares_of_the_last_step():
    step, chart = length_chart(LINES)
    assert step == 21
    assert [bar.text for bar in chart.bars] == [
        "2 tokens: 1 macro actions, 25.0 %",
        "5 tokens: 3 macro actions, 75.0 %",
    ]


def test_actions_of_one_length_are_no_picture():
    assert length_chart([]) is None
    assert length_chart(LINES[:1]) is None


def test_positions_are_shown_at_the_first_and_the_last_step():
    charts = position_charts(LINES)
    assert list(charts) == ["advantage", "value", "kl"]
    assert [name for _, name in charts["advantage"].names] == ["step 1", "step 21"]
    assert [point.text for point in charts["kl"].points] == [
        "action 1: step 1 0 nats, step 21 0.125 nats",
        "action 2: step 1 0 nats, step 21 0.25 nats",
    ]
    styles = [stroke.style for stroke in charts["advantage"].lines]
    assert styles == ["band", "band", "line", "line"]
    assert [stroke.style for stroke in charts["value"].lines] == ["line", "line"]


def test_what_does_not_change_is_no_chart():
    assert list(position_charts(LINES[:1])) == ["advantage", "value"]


def test_responses_that_are_one_action_have_no_positions():
    assert position_charts([]) == {}
    assert position_charts([line(1, {"9": 4}, (0.5, 1.0, 2.0))]) == {}


def test_without_a_critic_there_is_no_chart_of_values():
    positions = [{"count": 2, "advantage": 1.0, "kl": 0.5}, {"count": 2, "advantage": 0.0, "kl": 0}]
    assert list(position_charts([{"step": 1, "lengths": {"5": 4}, "positions": positions}])) == [
        "advantage",
        "kl",
    ]
