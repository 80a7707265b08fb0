"""Every decoder in turn under the fuzzer, and what came of it: ``python tests/fuzz/run.py > docs/results/fuzz.json``.

Exit code 1 if a decoder let out anything but its declared exception or took more than 600 MB.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path

FUZZER = Path(__file__).with_name("fuzz_decoders.py")
DECODERS = (
    "state", "update", "update-header", "screen", "wire", "messages", "manifest", "labels-csv", "coco", "voc",
)  # fmt: skip
MEMORY_MB = 600


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=110_000, help="for each decoder (%(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    found = {}
    kept = tempfile.mkdtemp(prefix="fedmpt-fuzz-")  # inputs that did harm, named in what is printed
    for name in DECODERS:
        command = [sys.executable, str(FUZZER), name, f"-runs={options.inputs}", f"-seed={options.seed}"]
        command += [f"-rss_limit_mb={MEMORY_MB}", "-print_final_stats=1", f"-artifact_prefix={kept}/"]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        runs, seconds = (
            _number(r"Done (\d+) runs", done.stderr),
            _number(r"runs in (\d+) second", done.stderr),
        )
        covered, peak = _last(r"cov: (\d+)", done.stderr), _number(r"peak_rss_mb:\s+(\d+)", done.stderr)
        found[name] = {
            "inputs": runs, "seconds": seconds, "edges covered": covered, "peak memory (MB)": peak,
            "sound": done.returncode == 0,
        }  # fmt: skip
        print(name, found[name], file=sys.stderr, flush=True)
        if done.returncode:
            print(done.stderr[-4000:], file=sys.stderr)
    sound = all(result["sound"] for result in found.values())
    commit = subprocess.run(
        ["git", "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=False
    )
    summary = {
        "inputs": sum(result["inputs"] for result in found.values()),
        "seed": options.seed,
        "decoders": found,
        "sound": sound,
        "commit": commit.stdout.strip(),
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("atheris", "safetensors", "numpy")},
        },
    }
    print(json.dumps(summary, indent=1))
    return 0 if sound else 1


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    return int(match[1]) if match else 0


def _last(pattern: str, text: str) -> int:
    matches = re.findall(pattern, text)
    return int(matches[-1]) if matches else 0


if __name__ == "__main__":
    sys.exit(main())
