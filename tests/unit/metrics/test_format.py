import math

import pytest

from marlhf_mega.metrics.format import axis_labels, compact, duration, number, rounded


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (31.0, "31"),
        (-0.12345, "-0.1235"),
        (1234.5, "1234"),
        (45678.9, "45,679"),
        (27000.0, "27,000"),
        (0.00001, "1e-5"),
        (-0.00012, "-1.2e-4"),
        (3.2e9, "3.2e9"),
        (math.nan, "nan"),
        (-math.inf, "-inf"),
        (None, "-"),
    ],
)
def test_numbers_are_short(value, text):
    assert number(value) == text


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (0.54217, 0.00878, "0.5422"),
        (-2.136, 0.125, "-2.14"),
        (27.75, 0.3016, "27.75"),
        (1.0, 0.2, "1.00"),
        (123.4567, 25.0, "123.5"),
        (0.5, 0.0, "0.5"),
        (0.5, None, "0.5"),
        (0.5, math.nan, "0.5"),
        (math.nan, 0.1, "nan"),
        (None, 0.1, "-"),
    ],
)
def test_a_standard_error_decides_how_many_digits_are_shown(value, error, text):
    assert rounded(value, error) == text


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([0.0, 5e-5, 1e-4], ["0", "0.5e-4", "1e-4"]),
        ([0.0, 0.001, 0.002], ["0", "0.001", "0.002"]),
        ([0.0, 0.2, 0.4], ["0", "0.2", "0.4"]),
        ([-5.0, 0.0, 5.0], ["-5", "0", "5"]),
        ([0.0, 5000.0, 10000.0], ["0", "5k", "10k"]),
        ([0.0, 2.5e6], ["0", "2.5M"]),
        ([1e15, 2e15], ["1e15", "2e15"]),
        ([0.0], ["0"]),
        ([], []),
    ],
)
def test_the_marks_of_an_axis_have_one_power_of_ten(values, labels):
    assert axis_labels(values) == labels


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (-0.12345, "-0.123"),
        (-0.00123, "-1.2e-3"),
        (0.00996, "0.00996"),
        (0.0099, "9.9e-3"),
        (999.4, "999"),
        (999.6, "1,000"),
        (-12345.6, "-12,346"),
        (99999.6, "1e5"),
        (-1234567.0, "-1.2e6"),
        (math.nan, "nan"),
    ],
)
def test_numbers_in_columns_have_at_most_seven_characters(value, text):
    assert compact(value) == text
    assert len(text) <= 7


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "-:--:--"),
        (0, "0:00:00"),
        (59.6, "0:01:00"),
        (3661, "1:01:01"),
        (360000, "100:00:00"),
    ],
)
def test_durations_are_hours_minutes_and_seconds(seconds, text):
    assert duration(seconds) == text
