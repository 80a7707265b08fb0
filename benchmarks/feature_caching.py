"""How much of ONNX Runtime's own speed a feature cache reaches, from JPEG files on disk to rows on disk.

``python benchmarks/feature_caching.py``: ViT-B/16's shapes, random weights, all cores that may be used.

The alternative is ONNX Runtime alone on the same encoder, fed with tensors that are ready in memory, its features
thrown away: as it comes (all cores share each operation, batches of 8), and with one stream a core as the cache
has it. Both include nothing but the photos; what comes before them (checking the encoder's digest, opening the
session) is a row of its own.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
from clip_shapes import VISION_PRODUCTS, encoder_flops, random_clip
from PIL import Image
from record import Row, append_record, floor_again, machine_floor, print_rows

from fedmpt.edge_client.cache import build_cache
from fedmpt.edge_client.datasets import LabelledPhoto
from fedmpt.edge_client.images import load_pixels
from fedmpt.export import graphs, programs
from fedmpt.export.bundle import PAPER_POOLING, PAPER_TRAINING
from fedmpt.protocol import manifest as bundles

SIZES = {"640x480": (640, 480), "4032x3024": (4032, 3024)}


def main() -> None:
    """Measure, print, record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--photos", type=int, default=64, help="photos in each repetition (%(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="repetitions (%(default)s)")
    parser.add_argument(
        "--sizes", nargs="+", choices=SIZES, default=list(SIZES), help="of the photos, in pixels"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bundle = write_encoder(folder / "bundle")
        floor = machine_floor(VISION_PRODUCTS)
        best_rate = floor["matmul_flops"] / encoder_flops()
        rows = []
        for size in arguments.sizes:
            photos = write_photos(folder / size, arguments.photos, SIZES[size])
            rows += measure(bundle, photos, size, folder / "cache", arguments.repeats, best_rate)
    rows, floor = floor_again(rows, floor, VISION_PRODUCTS)
    print_rows("Feature caching against ONNX Runtime alone", rows)
    append_record("feature_caching", rows, floor=floor)


def measure(
    bundle: Path, photos: Sequence[LabelledPhoto], size: str, out: Path, repeats: int, best_rate: float
) -> list[Row]:
    """Photos per second of all three, in turn; ``best_rate`` is what the machine's products would allow."""
    import onnxruntime  # after our package, which turns its telemetry off

    cores = len(os.sched_getaffinity(0))
    model = str(bundle / "image_encoder.onnx")
    shared = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    single = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    pixels = np.stack([load_pixels(photo.path, 224) for photo in photos])
    opening: list[float] = []

    def run_shared() -> tuple[float, float]:
        start = now()
        for first in range(0, len(pixels), 8):
            shared.run(None, {"pixels": pixels[first : first + 8]})
        return since(start)

    def run_streams() -> tuple[float, float]:
        start = now()
        with ThreadPoolExecutor(cores) as pool:
            firsts = range(0, len(pixels), 4)
            list(pool.map(lambda first: single.run(None, {"pixels": pixels[first : first + 4]}), firsts))
        return since(start)

    def run_cache() -> tuple[float, float]:
        shutil.rmtree(out, ignore_errors=True)
        calls = [now()]
        build_cache(photos, bundle, out, device="cpu", progress=lambda *_: calls.append(now()))
        opening.append(calls[1][0] - calls[0][0])
        return since(calls[1])

    cases = {
        "ONNX Runtime alone": run_shared,
        "ONNX Runtime alone, a stream a core": run_streams,
        "fedmpt cache": run_cache,
    }
    rates: dict[str, list[float]] = {name: [] for name in cases}
    work: dict[str, list[float]] = {name: [] for name in cases}
    for repetition in range(1 + repeats):
        for name, case in cases.items():
            seconds, processor = case()
            if repetition:  # the first warms up
                rates[name].append(len(photos) / seconds)
                work[name].append(processor / len(photos))
    parameters = {"photos": len(photos), "size": size, "cores": cores, "shapes": "ViT-B/16"}
    rows = [Row(name, "photos/s", samples, parameters, floor=best_rate) for name, samples in rates.items()]
    rows[2] = rows[2].compared_with(max(rows[:2], key=lambda row: row.median))
    rows.append(Row("opening the encoder", "s", opening[1:], parameters))
    # Less noisy than rates on a busy machine: processor time, of all cores together.
    return rows + [Row(name, "CPU s/photo", samples, parameters) for name, samples in work.items()]


def now() -> tuple[float, float]:
    """Seconds on the wall clock and of all the process's cores."""
    return time.perf_counter(), time.process_time()


def since(start: tuple[float, float]) -> tuple[float, float]:
    """Both since then."""
    wall, processor = now()
    return wall - start[0], processor - start[1]


def write_encoder(folder: Path) -> Path:
    """As much of a bundle as a feature cache needs: the image encoder and the manifest."""
    folder.mkdir()
    clip = random_clip(vocabulary=256)
    model = graphs.place_weights(programs.trace_image_encoder(clip, "clearclip", "full"), clip.vision, None)
    onnx.save(model, folder / "image_encoder.onnx")
    count, grid = 1 + clip.grid[0] * clip.grid[1], clip.grid
    manifest = bundles.BundleManifest(
        format=bundles.FORMAT,
        version=bundles.VERSION,
        method="zero-shot",
        labels=("label",),
        conditions=(),
        clip=bundles.Clip(
            clip.name, clip.licence, clip.image_size, clip.patch_size, 512, 512, clip.logit_scale
        ),
        tokens=bundles.Tokens("clearclip", "full", count, grid, 512),
        pooling=PAPER_POOLING,
        training=PAPER_TRAINING,
        precision="float32",
        state={},
        graphs={"image_encoder": bundles.Graph("image_encoder.onnx", {}, {})},
        files={
            "image_encoder.onnx": hashlib.sha256((folder / "image_encoder.onnx").read_bytes()).hexdigest()
        },
    )
    bundles.save_manifest(folder, manifest)
    return folder


def write_photos(folder: Path, count: int, size: tuple[int, int]) -> list[LabelledPhoto]:
    """JPEG files of quality 90 with detail at every scale, as costly to decode as photographs of their size."""
    folder.mkdir()
    width, height = size
    photos = []
    for seed in range(count):
        random = np.random.default_rng(seed)
        image = Image.new("RGB", size)
        for cells in (4, 32, 256):
            noise = random.integers(0, 256, (cells, cells, 3), np.uint8)
            layer = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
            image = Image.blend(image, layer, 0.5)
        image.save(folder / f"{seed}.jpg", quality=90)
        photos.append(LabelledPhoto(folder / f"{seed}.jpg", np.ones(1, np.int8)))
    return photos


if __name__ == "__main__":
    main()
