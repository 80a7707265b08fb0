"""Shows the project's own log on stderr, as text or as JSON lines."""

from __future__ import annotations

import json
import logging
import sys

from rich.console import Console

from fedmpt.protocol.text import printable

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def show_logs(*, as_json: bool = False, console: Console | None = None) -> None:
    """Send ``fedmpt`` log records from INFO on to stderr; other libraries' stay as they are.

    A record's ``extra`` fields follow its text, or are fields of its JSON object. ``console`` is one that draws
    a live line, which records must not tear.
    """
    logger = logging.getLogger("fedmpt")
    logger.setLevel(logging.INFO)
    handler = logging.StreamHandler(sys.stderr) if console is None else _ConsoleHandler(console)
    handler.setFormatter(_JsonFormatter() if as_json else _TextFormatter())
    logger.handlers = [handler]


class _ConsoleHandler(logging.Handler):
    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        self._console.print(self.format(record), markup=False, highlight=False, soft_wrap=True)


class _TextFormatter(logging.Formatter):
    def formatMessage(self, record: logging.LogRecord) -> str:
        facts = ", ".join(f"{name} {_shown(value)}" for name, value in _facts(record).items())
        text = super().formatMessage(record)
        return printable(f"{text}: {facts}" if facts else text)  # strangers' text is among the facts


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {"time": record.created, "level": record.levelname.lower(), "event": record.getMessage()}
        return json.dumps(line | _facts(record), ensure_ascii=False, default=str)


def _facts(record: logging.LogRecord) -> dict[str, object]:
    return {name: value for name, value in vars(record).items() if name not in _STANDARD}


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
