"""The chaos run in its short form; the long one is ``python tests/chaos/run.py``."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).with_name("run.py")


@pytest.mark.slow
@pytest.mark.usefixtures("mosquitto_program")
def test_kills_and_disturbed_messages_do_not_change_one_bit() -> None:
    options = ["--rounds", "8", "--clients", "3", "--kills", "4", "--pause", "0.7"]
    done = subprocess.run([sys.executable, RUN, *options], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr + done.stdout
    summary = json.loads(done.stdout)
    assert summary["bit_identical"]
    assert summary["kills"] == 4
