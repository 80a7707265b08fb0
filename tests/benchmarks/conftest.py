"""The benchmarks are scripts; behind all else on the path, so that none shadows a package."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
