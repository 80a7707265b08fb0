"""Shows the project's own log on stderr."""

from __future__ import annotations

import logging
import sys


def show_logs() -> None:
    """Send ``fedmpt`` log records from INFO on to stderr as plain lines; other libraries' stay as they are."""
    logger = logging.getLogger("fedmpt")
    logger.setLevel(logging.INFO)
    logger.handlers = [logging.StreamHandler(sys.stderr)]
