"""The daily window in which a site may train."""

import datetime

import pytest

from fedmpt.edge_client.schedule import ScheduleError, parse_window


@pytest.mark.parametrize(
    ("window", "moment", "inside"),
    [
        ("08:00-17:30", "08:00", True),
        ("08:00-17:30", "17:29", True),
        ("08:00-17:30", "17:30", False),
        ("08:00-17:30", "07:59", False),
        ("22:00-06:00", "23:59", True),
        ("22:00-06:00", "00:00", True),
        ("22:00-06:00", "06:00", False),
        ("22:00-06:00", "12:00", False),
        ("00:00-00:00", "13:00", True),
    ],
)
def test_a_window_starts_and_ends_on_the_minute_and_may_pass_midnight(window, moment, inside):
    assert parse_window(window).contains(datetime.time.fromisoformat(moment)) is inside


@pytest.mark.parametrize("text", ["", "22-6", "24:00-06:00", "22:00", "22:60-06:00", "22:00-06:00 daily"])
def test_anything_else_is_refused_with_an_example(text):
    with pytest.raises(ScheduleError, match="such as 22:00-06:00"):
        parse_window(text)
