"""How fast photos are tagged, from JPEG files to labels, against ONNX Runtime alone and against transformers.

``python benchmarks/tagging.py``: ViT-B/16's shapes, random weights, 20 labels, 5 conditions, all cores.

- ONNX Runtime alone runs the bare image encoder on tensors that are ready in memory, with all cores at one batch of 8
  or a batch of 2 on each, as ``fedmpt tag`` has it, which decodes files and is compared with the faster of both.
- transformers is the loop one would write: open the files, ``CLIPImageProcessorPil``, ``CLIPModel.get_image_features``,
  similarity to text features that were encoded once; the same files, batch and threads.
- The head (transport, gate, sigmoid) is timed on ready tokens, against the whole tagger on ready pixels.
- int8 is the file that ``fedmpt export --precision int8`` writes.

Building the bundle takes minutes; ``--bundle`` keeps it for the next run.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from clip_shapes import VISION_PRODUCTS, encoder_flops, random_clip
from feature_caching import write_photos
from PIL import Image
from record import Row, append_record, floor_again, interleave, machine_floor, print_rows

from fedmpt.edge_client.images import load_pixels
from fedmpt.edge_client.tagger import Tagger
from fedmpt.edge_client.tagging import STREAM_BATCH_SIZE, Tagged, tag_photos
from fedmpt.export.bundle import PAPER_TRAINING, build_bundle
from fedmpt.export.tagger import export_tagger
from fedmpt.protocol.codec import load_state
from fedmpt.protocol.manifest import load_manifest

LABELS = tuple(f"label {index}" for index in range(20))
PHOTO_SIZE = (640, 480)
ALONE, STREAMS, TRANSFORMERS, FLOAT32, INT8 = (
    "ONNX Runtime alone",
    "ONNX Runtime alone, a stream a core",
    "transformers loop",
    "fedmpt tag",
    "fedmpt tag, int8",
)


def main() -> None:
    """Measure, print, record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", type=Path, help="folder to keep the bundle in, or to find it")
    parser.add_argument("--photos", type=int, default=48, help="photos in each repetition (%(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="repetitions (%(default)s)")
    parser.add_argument(
        "--batch-size",
        type=int,
        default=8,
        help="photos at once where all cores share a batch (%(default)s)",
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bundle = arguments.bundle or folder / "bundle"
        if not bundle.exists():
            training = dataclasses.replace(PAPER_TRAINING, batch_size=2)
            build_bundle(random_clip(vocabulary=512), LABELS, bundle, method="fedmpt-full", training=training)
        photos = [photo.path for photo in write_photos(folder / "photos", arguments.photos, PHOTO_SIZE)]
        taggers = export(bundle, photos, folder)
        floor = machine_floor(VISION_PRODUCTS)
        best_rate = floor["matmul_flops"] / encoder_flops()
        rows = measure(bundle, taggers, photos, arguments.repeats, arguments.batch_size, best_rate)
    rows, floor = floor_again(rows, floor, VISION_PRODUCTS)
    print_rows("Tagging", rows)
    append_record("tagging", rows, floor=floor)


def export(bundle: Path, photos: Sequence[Path], folder: Path) -> dict[str, Path]:
    """A float32 and an int8 tagger of the bundle's initial state."""
    state = load_state(bundle / "state.safetensors", load_manifest(bundle).state)
    ranges = [np.stack([load_pixels(path, 224) for path in photos[start : start + 4]]) for start in (0, 4)]
    files = {}
    for precision in ("float32", "int8"):
        files[precision] = folder / precision / "tagger.onnx"
        export_tagger(bundle, state, files[precision], precision=precision, photos=ranges)
    return files


def measure(
    bundle: Path,
    files: dict[str, Path],
    photos: Sequence[Path],
    repeats: int,
    batch_size: int,
    best_rate: float,
) -> list[Row]:
    """All cases in turn; ``best_rate`` is what the machine's float32 products would allow."""
    taggers = {precision: Tagger.load(path, "cpu", many=True) for precision, path in files.items()}
    whole = {precision: Tagger.load(path, "cpu") for precision, path in files.items()}
    encoder = open_session(bundle / "image_encoder.onnx")
    single = open_session(bundle / "image_encoder.onnx", threads=1)
    cores = len(os.sched_getaffinity(0))
    head, head_inputs = open_head(bundle)
    pixels = np.stack([load_pixels(path, 224) for path in photos])
    batches = np.array_split(pixels, range(batch_size, len(pixels), batch_size))
    small = np.array_split(pixels, range(STREAM_BATCH_SIZE, len(pixels), STREAM_BATCH_SIZE))
    tokens = [encoder.run(None, {"pixels": batch})[0] for batch in batches]

    def tag(tagger: Tagger) -> None:
        results = list(tag_photos(tagger, photos))
        assert all(isinstance(result, Tagged) for result in results)

    def each(run: Callable[[Any], object], parts: Sequence[Any]) -> None:
        for part in parts:
            run(part)

    def stream() -> None:
        with ThreadPoolExecutor(cores) as pool:
            list(pool.map(lambda batch: single.run(None, {"pixels": batch}), small))

    seconds = interleave(
        {
            ALONE: lambda: each(lambda batch: encoder.run(None, {"pixels": batch}), batches),
            STREAMS: stream,
            FLOAT32: lambda: tag(taggers["float32"]),
            TRANSFORMERS: transformers_loop(photos, batch_size),
            INT8: lambda: tag(taggers["int8"]),
            "tagger, pixels ready": lambda: each(whole["float32"].predict, batches),
            "int8 tagger, pixels ready": lambda: each(whole["int8"].predict, batches),
            "head, tokens ready": lambda: each(
                lambda part: head.run(None, {**head_inputs, "tokens": part}), tokens
            ),
        },
        repeats,
        warmup=2,
    )
    parameters = {"photos": len(photos), "size": "640x480", "labels": len(LABELS)}

    def row(name: str, against: str = "") -> Row:
        floor = None if "int8" in name else best_rate
        rates = [len(photos) / value for value in seconds[name]]
        found = Row(name, "photos/s", rates, parameters, floor=floor)
        return found.compared_with(row(against)) if against else found

    share = np.array(seconds["head, tokens ready"]) / np.array(seconds["tagger, pixels ready"])
    best = min(ALONE, STREAMS, key=lambda name: statistics.median(seconds[name]))
    return [
        row(ALONE),
        row(STREAMS),
        row(FLOAT32, best),
        row(TRANSFORMERS),
        row(FLOAT32, TRANSFORMERS),
        row(INT8, TRANSFORMERS),
        row("tagger, pixels ready", ALONE),
        row("int8 tagger, pixels ready", "tagger, pixels ready"),
        Row("head's share of the tagger's time", "fraction", share.tolist(), parameters),
    ]


def transformers_loop(photos: Sequence[Path], batch_size: int) -> Callable[[], None]:
    """Zero-shot tagging as one writes it with transformers, on a random model of the same shapes."""
    torch.manual_seed(0)
    model = transformers.CLIPModel(
        transformers.CLIPConfig(
            vision_config={"patch_size": 16, "image_size": 224},
            text_config={"num_hidden_layers": 1, "vocab_size": 512, "bos_token_id": 1, "eos_token_id": 2},
        )
    ).eval()
    processor = transformers.CLIPImageProcessorPil()
    text = torch.nn.functional.normalize(torch.randn(len(LABELS), 512), dim=-1)

    @torch.inference_mode()
    def run() -> None:
        for start in range(0, len(photos), batch_size):
            images = [Image.open(path) for path in photos[start : start + batch_size]]
            inputs = processor(images=images, return_tensors="pt")
            features = model.get_image_features(**inputs).pooler_output
            similarity = torch.nn.functional.normalize(features, dim=-1) @ text.T
            (model.logit_scale.exp() * similarity).softmax(-1).numpy()

    return run


def open_head(bundle: Path) -> tuple[Any, dict[str, np.ndarray]]:
    """The bundle's head, and its inputs but the tokens."""
    manifest = load_manifest(bundle)
    state = load_state(bundle / "state.safetensors", manifest.state)
    text = open_session(bundle / "text_features.onnx").run(
        ["text"], {name: state[name] for name in manifest.graphs["text_features"].inputs}
    )[0]
    values = {**state, "text": text}
    inputs = {name: values[name] for name in manifest.graphs["head"].inputs if name != "tokens"}
    return open_session(bundle / "head.onnx"), inputs


def open_session(path: Path, threads: int = 0) -> Any:
    """ONNX Runtime with its defaults: all cores, where no number of threads is given."""
    import onnxruntime  # after our package, which turns its telemetry off

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


if __name__ == "__main__":
    main()
