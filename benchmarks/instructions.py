"""Machine instructions of one call of what runs in NumPy and Python: what does not depend on how busy a machine is.

``python benchmarks/instructions.py`` needs valgrind: it runs itself under callgrind, which writes its counters at each
mark. This guards against work that grows unnoticed; it says little of time, since ten instructions may take a few
cycles or hundreds.
"""

from __future__ import annotations

import argparse
import gc
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from record import Row, append_record, print_rows

from fedmpt.aggregator.admission import AdmissionContext, admit
from fedmpt.aggregator.strategies import Contribution, StrategySettings, aggregate
from fedmpt.edge_client.optimizers import adamw_step, sgd_step
from fedmpt.protocol.codec import Update, decode_update, encode_update, state_digest, state_limit
from fedmpt.protocol.manifest import TensorSpec
from fedmpt.protocol.messages import ENCODINGS, Limits

SHAPES = {"condition_context": (5, 4, 512), "class_context": (4, 512), "scale": (), "bias": ()}
CLIENTS = 10
SAMPLES, CALLS = 5, 4


def main() -> None:
    """Measure, print, record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--here", action="store_true", help="only make the calls, with the marks between them"
    )
    if parser.parse_args().here:
        call_all()
        return
    counts = iter(count())
    parameters = {"tensors": "ViT-B/16, prompts"}
    # Before each case, a mark closes what is not measured.
    rows = []
    for name in works():
        next(counts)
        samples = [next(counts) / CALLS for _ in range(SAMPLES)]
        rows.append(Row(name, "instructions", samples, parameters))
    print_rows("Instructions", rows)
    append_record("instructions", rows)


def count() -> list[int]:
    """Instructions between marks, from a run of this script under callgrind."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "counts"
        command = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={out}", "--dump-before=getppid"]
        environment = os.environ | {
            "PYTHONHASHSEED": "0",
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
        result = subprocess.run(
            [*command, sys.executable, __file__, "--here"], env=environment, capture_output=True, text=True
        )
        if result.returncode:
            raise SystemExit(f"valgrind ended with exit code {result.returncode}:\n{result.stderr[-2000:]}")
        dumps = sorted(out.parent.glob("counts.*"), key=lambda path: int(path.suffix[1:]))
        totals = [re.search(r"^(?:totals|summary): (\d+)", path.read_text(), re.MULTILINE) for path in dumps]
    expected = len(works()) * (1 + SAMPLES)
    if len(totals) != expected or None in totals:
        raise SystemExit(f"callgrind wrote {len(totals)} counts where {expected} were expected")
    return [int(total[1]) for total in totals if total]


def mark() -> None:
    """A system call that nothing else makes: callgrind writes its counters and begins again."""
    os.getppid()


def call_all() -> None:
    """Each case: some calls to warm up, a mark, then a mark after each sample."""
    for call in works().values():
        for _ in range(CALLS):
            call()
        gc.collect()
        gc.disable()
        mark()
        for _ in range(SAMPLES):
            for _ in range(CALLS):
                call()
            mark()
        gc.enable()


def works() -> dict[str, Callable[[], object]]:
    """The cases by name."""
    random = np.random.default_rng(0)
    state = {name: np.asarray(random.standard_normal(shape), np.float32) for name, shape in SHAPES.items()}
    specs = {name: TensorSpec("float32", shape) for name, shape in SHAPES.items()}
    base = state_digest(state)
    update = Update("bench", 1, "client", base, 100, 10, {"mAP": 0.5}, state)
    payloads = {encoding: encode_update(update, encoding) for encoding in ENCODINGS}
    limits = Limits(update_bytes=state_limit(specs), samples=1000, norm=1e9)
    context = AdmissionContext("bench", 1, base, frozenset({"client"}), specs, limits, True)
    assert admit(payloads["float16"], "client", context) is None
    rates = dict.fromkeys(SHAPES, 1e-3)
    sgd_memory = sgd_step(state, state, {}, rates, 0.9, 0.0)[1]
    adamw_memory = adamw_step(state, state, {}, rates, 0.9, 0.0)[1]

    def contributions() -> Iterator[Contribution]:
        return (Contribution(f"client-{number}", 100, state) for number in range(CLIENTS))

    def write(encoding: str) -> Callable[[], object]:
        return lambda: encode_update(update, encoding)

    def read(encoding: str) -> Callable[[], object]:
        return lambda: decode_update(payloads[encoding], specs, state_limit(specs))

    return {
        **{f"write update, {encoding}": write(encoding) for encoding in ENCODINGS},
        **{f"read update, {encoding}": read(encoding) for encoding in ENCODINGS},
        "admit update, float16": lambda: admit(payloads["float16"], "client", context),
        f"average {CLIENTS} updates": lambda: aggregate(
            StrategySettings("uniform"), state, contributions, {}, calibrating=False
        ),
        "SGD step": lambda: sgd_step(state, state, sgd_memory, rates, 0.9, 0.0),
        "AdamW step": lambda: adamw_step(state, state, adamw_memory, rates, 0.9, 0.0),
    }


if __name__ == "__main__":
    main()
