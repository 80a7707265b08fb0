"""Coverage-guided fuzzing of all that reads strangers' bytes: ``python fuzz_decoders.py update -runs=1000000``.

Needs ``pip install atheris``. The first argument chooses the decoder; the rest are libFuzzer's. Only the declared
exception may leave a decoder; anything else stops the run with the input that did it, and so does memory above
``-rss_limit_mb=600``. Sound inputs are the first corpus, so that mutations reach the deep checks.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris
import numpy as np

with atheris.instrument_imports(include=["fedmpt"]):
    from fedmpt.edge_client import datasets, labels
    from fedmpt.protocol import codec, manifest, messages, screening, wire

from fedmpt.protocol.errors import FedmptError
from fedmpt.protocol.manifest import TensorSpec

SPECS = {"bias": TensorSpec("float32", ()), "class_context": TensorSpec("float32", (2, 3))}
# In memory where that is possible: some decoders read files, and a disk would take most of the time.
MEMORY = Path("/dev/shm")
SCRATCH = Path(tempfile.mkdtemp(prefix="fedmpt-fuzz-", dir=MEMORY if MEMORY.is_dir() else None))
KINDS = (messages.Manifest, messages.Round, messages.Receipt, messages.Presence, messages.Status)


def fuzz_state(data: bytes) -> None:
    codec.decode_state(data, SPECS)


def fuzz_update(data: bytes) -> None:
    update, _ = codec.decode_update(data, SPECS, 1 << 16)
    manifest.canonical_json(update.metrics)  # the aggregator writes them to its history


def fuzz_update_header(data: bytes) -> None:
    """The mutated bytes are the JSON header of an otherwise sound container, so that deeper checks are reached."""
    container = json.dumps({"__metadata__": {"fedmpt": data.decode("utf-8", "replace")}}).encode()
    codec.decode_update(len(container).to_bytes(8, "little") + container, SPECS, 1 << 16)


def fuzz_screen(data: bytes) -> None:
    """What the quick look takes must be decoded without an error, for nobody looks again before the round closes."""
    if SCREEN.norm(data, "north") is None:
        return
    try:
        codec.decode_update(data, SPECS, 1 << 16)
    except FedmptError as error:
        raise AssertionError("taken, and cannot be decoded") from error


def fuzz_wire(data: bytes) -> None:
    """A broker's bytes in blocks of 7; a malformed stream ends the connection with OSError."""
    blocks = [data[place : place + 7] for place in range(0, len(data), 7)]
    reader = wire.Wire(_Blocks(blocks), True, lambda published, acknowledged: None)
    with contextlib.suppress(OSError):
        while blocks or reader.pending():
            with contextlib.suppress(BlockingIOError):
                reader.recv(3)


class _Blocks:
    def __init__(self, blocks: list[bytes]) -> None:
        self._blocks = blocks

    def recv_into(self, room: memoryview) -> int:
        if not self._blocks:
            raise BlockingIOError
        block = self._blocks.pop(0)
        room[: len(block)] = block
        return len(block)


def fuzz_messages(data: bytes) -> None:
    """What was read can be written again, by whoever answers it or passes it on."""
    kind = KINDS[data[0] % len(KINDS)] if data else KINDS[0]
    messages.to_json(messages.from_json(kind, data[1:], "fuzz"))


def fuzz_manifest(data: bytes) -> None:
    (SCRATCH / "manifest.json").write_bytes(data)
    manifest.load_manifest(SCRATCH)


def fuzz_labels_csv(data: bytes) -> None:
    (SCRATCH / "labels.csv").write_bytes(data)
    datasets.read_folder(SCRATCH, LABELS)


def fuzz_coco(data: bytes) -> None:
    (SCRATCH / "instances.json").write_bytes(data)
    datasets.read_coco(SCRATCH / "instances.json", SCRATCH, LABELS)


def fuzz_voc(data: bytes) -> None:
    folder = SCRATCH / "Annotations"
    folder.mkdir(exist_ok=True)
    (folder / "one.xml").write_bytes(data)
    datasets.read_voc(SCRATCH, LABELS)


SCREEN = screening.Screen(
    SPECS,
    messages.Limits(1 << 16, 100, 100.0),
    federation="farm",
    round_number=1,
    base="0" * 64,
    metrics=True,
)
LABELS = labels.LabelRules(("cat", "chair"))
DECODERS: dict[str, Callable[[bytes], None]] = {
    "state": fuzz_state,
    "update": fuzz_update,
    "update-header": fuzz_update_header,
    "screen": fuzz_screen,
    "wire": fuzz_wire,
    "messages": fuzz_messages,
    "manifest": fuzz_manifest,
    "labels-csv": fuzz_labels_csv,
    "coco": fuzz_coco,
    "voc": fuzz_voc,
}


def sound_inputs(name: str) -> list[bytes]:
    """Inputs that the decoder ``name`` accepts, or nearly."""
    state = {"bias": np.float32(0.5), "class_context": np.ones((2, 3), np.float32)}
    update = codec.Update("farm", 1, "north", "0" * 64, 20, 2, {"mAP": 0.5}, state)
    updates = [codec.encode_update(update, encoding) for encoding in messages.ENCODINGS]
    header = json.loads(updates[2][8 : 8 + int.from_bytes(updates[2][:8], "little")])["__metadata__"][
        "fedmpt"
    ]
    presence = messages.Presence("farm", "north", True, "0" * 64, 20, {"engine": "onnx"})
    coco = {
        "images": [{"id": 1, "file_name": "a.jpg", "width": 4, "height": 4}],
        "categories": [{"id": 3, "name": "cat"}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 3, "bbox": [0, 0, 1, 1], "iscrowd": 0}],
    }
    voc = "<annotation><filename>a.jpg</filename><object><name>cat</name><difficult>0</difficult></object></annotation>"
    return {
        "state": [codec.encode_state(state)],
        "update": updates,
        "update-header": [header.encode()],
        "screen": updates,
        "wire": [
            b"\x20\x03\x00\x00\x00" + wire.encode_pubacks([3]) + b"\xd0\x00",
            wire.encode_publish(b"fedmpt/a", b"x" * 40, 1, retain=True, duplicate=False, five=True),
        ],
        "messages": [bytes([KINDS.index(messages.Presence)]) + messages.to_json(presence)],
        "manifest": [b'{"format": "fedmpt-bundle", "version": 1, "method": "coop", "labels": ["cat"]}'],
        "labels-csv": [b"path,labels,unknown\na.jpg,cat;chair,\nb.jpg,,cat\n"],
        "coco": [json.dumps(coco).encode()],
        "voc": [voc.encode()],
    }[name]


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in DECODERS:
        sys.exit(f"usage: {sys.argv[0]} {{{','.join(DECODERS)}}} [libFuzzer options]")
    name = sys.argv.pop(1)
    decoder = DECODERS[name]
    corpus = SCRATCH / "corpus"
    corpus.mkdir()
    for number, data in enumerate(sound_inputs(name)):
        (corpus / str(number)).write_bytes(data)
    sys.argv.append(str(corpus))

    def declared_only(data: bytes) -> None:
        try:
            decoder(data)
        except FedmptError as error:
            if not str(error):
                raise AssertionError("an error without a text") from error

    atheris.Setup(sys.argv, declared_only)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
