"""Bytes on the wire, and the time to write and to read them: the protocol's payloads against a pickled state dict.

``python benchmarks/codec.py``: an update (the difference to the base state) in each encoding, and a state, for
three sets of tensors with 5 conditions: ViT-B/16's prompts alone, micro-CLIP and ViT-B/16 with adapters and gate.
The alternatives hold the same float32 tensors: ``torch.save`` and ``torch.load`` of a PyTorch state dict, the same of
one converted to float16, with which the float16 update is compared, and ``pickle`` of a dictionary of NumPy arrays.
Our reading includes the checks of names, shapes and finiteness, which they leave to their callers. Times are processor
time of one thread.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import io
import pickle
import time
from collections.abc import Callable, Mapping

import numpy as np
import torch
from record import Row, append_record, interleave, print_rows, repeated

from fedmpt.protocol.codec import (
    State,
    Update,
    decode_state,
    decode_update,
    encode_state,
    encode_update,
    state_digest,
    state_limit,
)
from fedmpt.protocol.manifest import TensorSpec

CONDITIONS, CONTEXT, RANK = 5, 4, 32
ITEM_BYTES = {"update, float32": 4, "update, float16": 2, "update, int8": 1}
ALTERNATIVE, HALVED = "torch.save", "torch.save, float16"
COPY = "a copy of the tensors, in memory"
CALLS = 20
"""Calls in one sample: a single one is too short to time."""


@dataclasses.dataclass(frozen=True)
class Form:
    """One way to write and read a set of tensors."""

    write: Callable[[], bytes]
    read: Callable[[bytes], object]


def main() -> None:
    """Measure, print, record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=15, help=f"samples of {CALLS} calls (%(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tensors = {
        "ViT-B/16, prompts": prompts(text_width=512),
        "micro-CLIP, full": full(width=192, text_width=192),
        "ViT-B/16, full": full(width=512, text_width=512),
    }
    rows = [row for name, shapes in tensors.items() for row in measure(name, shapes, arguments.repeats)]
    print_rows("Payloads", rows)
    append_record("codec", rows)


def prompts(text_width: int) -> dict[str, tuple[int, ...]]:
    """Shapes of a ``fedmpt-prompts`` state."""
    contexts = {
        "condition_context": (CONDITIONS, CONTEXT, text_width),
        "class_context": (CONTEXT, text_width),
    }
    return {**contexts, "scale": (), "bias": ()}


def full(width: int, text_width: int) -> dict[str, tuple[int, ...]]:
    """Shapes of a ``fedmpt-full`` state."""
    return prompts(text_width) | {
        "adapter_down": (CONDITIONS, RANK, width),
        "adapter_up": (CONDITIONS, width, RANK),
        "gate_down": (RANK, width),
        "gate_up": (CONDITIONS, RANK),
    }


def measure(name: str, shapes: Mapping[str, tuple[int, ...]], repeats: int) -> list[Row]:
    """Bytes, times and errors of all forms of one set of tensors."""
    random = np.random.default_rng(0)
    difference = {
        key: np.asarray(0.01 * random.standard_normal(shape), np.float32) for key, shape in shapes.items()
    }
    values = sum(tensor.size for tensor in difference.values())
    found = forms(difference)
    payloads = {case: form.write() for case, form in found.items()}
    block = np.zeros(values, np.float32)
    copy = {COPY: repeated(block.copy, CALLS)}
    writing = interleave(
        copy | {case: repeated(form.write, CALLS) for case, form in found.items()},
        repeats,
        clock=time.process_time,
    )
    reading = interleave(
        copy
        | {
            case: repeated(functools.partial(form.read, payloads[case]), CALLS)
            for case, form in found.items()
        },
        repeats,
        clock=time.process_time,
    )
    parameters = {"tensors": name, "values": values}

    def rows_of(unit: str, samples: Mapping[str, list[float]], copied: float | None = None) -> list[Row]:
        """``copied`` is the time of a plain copy of float32 values; bytes have the tensors' own as floor."""
        rows = []
        for case, numbers in samples.items():
            item = (ITEM_BYTES | {HALVED: 2}).get(case, 4)
            other = HALVED if case == "update, float16" else ALTERNATIVE
            row = Row(case, unit, numbers, parameters)
            if case != COPY:
                floor = item * values if copied is None else copied * (4 + item) / 8
                row = dataclasses.replace(row, floor=floor)
            if case not in (ALTERNATIVE, COPY):
                row = row.compared_with(Row(other, unit, samples[other]))
            rows.append(row)
        return rows

    sizes = {case: [float(len(payload))] for case, payload in payloads.items()}
    errors = [
        Row(
            f"{case}: largest error",
            "of the tensor's largest value",
            [error(difference, payloads[case])],
            {"tensors": name},
        )
        for case in ITEM_BYTES
    ]
    return [
        *rows_of("bytes", sizes),
        *rows_of("CPU ms to write", milliseconds(writing), 1e3 * min(writing[COPY]) / CALLS),
        *rows_of("CPU ms to read", milliseconds(reading), 1e3 * min(reading[COPY]) / CALLS),
        *errors,
    ]


def forms(difference: State) -> dict[str, Form]:
    """The protocol's payloads and the alternatives."""
    specs = specifications(difference)
    update = Update("bench", 1, "client", state_digest(difference), 100, 10, {"mAP": 0.5}, difference)
    state_dict = {name: torch.from_numpy(tensor) for name, tensor in difference.items()}

    def save(tensors: Mapping[str, torch.Tensor]) -> bytes:
        file = io.BytesIO()
        torch.save(tensors, file)
        return file.getvalue()

    return {
        ALTERNATIVE: Form(lambda: save(state_dict), lambda data: torch.load(io.BytesIO(data))),
        HALVED: Form(
            lambda: save({name: tensor.half() for name, tensor in state_dict.items()}),
            lambda data: {name: tensor.float() for name, tensor in torch.load(io.BytesIO(data)).items()},
        ),
        "pickle of NumPy arrays": Form(lambda: pickle.dumps(difference, protocol=5), pickle.loads),
        **{
            case: Form(
                functools.partial(encode_update, update, case.removeprefix("update, ")),
                lambda data: decode_update(data, specs, state_limit(specs)),
            )
            for case in ITEM_BYTES
        },
        "state, float32": Form(lambda: encode_state(difference), lambda data: decode_state(data, specs)),
    }


def specifications(state: State) -> dict[str, TensorSpec]:
    """What a reader expects."""
    return {name: TensorSpec("float32", tensor.shape) for name, tensor in state.items()}


def error(difference: State, payload: bytes) -> float:
    """What an encoding loses: the largest error of any tensor, as a share of its largest value."""
    specs = specifications(difference)
    update, _ = decode_update(payload, specs, state_limit(specs))
    return max(
        float(np.abs(update.difference[name] - tensor).max() / np.abs(tensor).max())
        for name, tensor in difference.items()
    )


def milliseconds(seconds: Mapping[str, list[float]]) -> dict[str, list[float]]:
    """Of one call."""
    return {case: [1e3 * value / CALLS for value in values] for case, values in seconds.items()}


if __name__ == "__main__":
    main()
