"""The ``fedmpt`` command."""

from fedmpt.cli.main import main

__all__ = ["main"]
