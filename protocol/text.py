"""Text that strangers wrote, made fit for an error, a log line or a terminal."""

from __future__ import annotations

QUOTED = 80  # characters at most


def quoted(text: str, limit: int = QUOTED) -> str:
    """``text`` in quotes on one line, control characters escaped, cut to ``limit`` characters."""
    shown = repr(text[:limit])
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


def printable(text: str) -> str:
    """``text`` on one line: newlines, escape sequences and what turns the direction of writing are escaped."""
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in text
    )
