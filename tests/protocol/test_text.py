"""Strangers' text stays on its line and cannot steer a terminal."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fedmpt.protocol.text import printable, quoted

any_text = st.text(st.characters(), max_size=200)  # half surrogate pairs too


def test_plain_text_stays_as_it_is() -> None:
    assert printable("Bläßhuhn, 白鹭") == "Bläßhuhn, 白鹭"
    assert quoted("north") == "'north'"


def test_what_steers_a_terminal_is_escaped() -> None:
    assert printable("a\x1b[2J\nb\x9b\u202ec\ud800") == r"a\x1b[2J\nb\x9b\u202ec\ud800"
    assert quoted("a\x1b[2J\n") == r"'a\x1b[2J\n'"


@given(any_text)
def test_quoted_text_is_short_and_on_one_line(text: str) -> None:
    shown = quoted(text)
    assert shown.isprintable()
    assert len(shown) <= 80


@given(any_text)
def test_printable_text_can_be_written_anywhere(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable()
    shown.encode()
