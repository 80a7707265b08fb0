"""Peak memory of training steps in a process that imports what an edge site does: ``step_memory.py BUNDLE``."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import numpy as np

from fedmpt.edge_client.onnx_session import open_session


def peak_of_steps(folder: Path, steps: int = 4) -> float:
    """Peak anonymous memory in MB of this process, which opens the graph as the edge does and takes steps."""
    peak, done = 0.0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, anonymous_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        session = open_session(
            folder / "train_step.onnx", "cpu", files=("text_weights.safetensors",), plan_memory=False
        )
        kinds = {"tensor(float)": np.float32, "tensor(int8)": np.int8}
        feed = {item.name: np.full(item.shape, 0.01, kinds[item.type]) for item in session.get_inputs()}
        feed["labels"] = np.ones_like(feed["labels"])
        for _ in range(steps):
            session.run(None, feed)
    finally:
        done.set()
        watcher.join()
    return peak


def anonymous_memory() -> float:
    """Resident memory in MB that no file backs (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise SystemExit("/proc/self/status has no RssAnon; this needs Linux")


if __name__ == "__main__":
    print(peak_of_steps(Path(sys.argv[1])))
