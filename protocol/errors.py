"""The exceptions that the command line turns into a message and exit code 1."""

from __future__ import annotations


class FedmptError(Exception):
    """An expected failure. Its text names the file or message, what was wrong, and what to do.

    Every more specific error of the project derives from this one, and the one-line text is all a user sees.
    """
