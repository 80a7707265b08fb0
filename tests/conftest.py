"""Shared by all tests: a tiny random CLIP folder and the bundle made of it, each built once per session."""

from __future__ import annotations

import contextlib
import getpass
import hashlib
import json
import logging
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

MOSQUITTO = shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin")

TINY_LABELS = ("cat", "dog", "traffic light", "potted plant")
WORDS = ("cat", "dog", "light", "traffic", "plant", "photo", "layout", "background", "lighting", "weather")
TINY_CONDITIONS = ("spatial layout", "background", "lighting and weather")


@pytest.fixture(autouse=True)
def keep_the_log_as_it_was() -> Iterator[None]:
    """A command sends the log to the stderr of its test; what is logged later must not go to that closed file."""
    logger = logging.getLogger("fedmpt")
    handlers, level = logger.handlers, logger.level
    yield
    logger.handlers, logger.level = handlers, level


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face ``CLIPModel`` folder with random weights: 48 px, patch 16 (a 3 × 3 grid), width 32."""
    return write_tiny_clip(tmp_path_factory.mktemp("tiny-clip"))


@pytest.fixture(scope="session")
def make_clip() -> Callable[..., Path]:
    """``write_tiny_clip``, for tests that want other sizes."""
    return write_tiny_clip


@pytest.fixture(scope="session")
def tiny_bundle(request: pytest.FixtureRequest) -> Path:
    """The bundle of ``tiny_clip`` for ``fedmpt-prompts``, ``TINY_LABELS`` and ``TINY_CONDITIONS``, batch 8.

    Tracing takes ten seconds, so it is kept in pytest's cache folder until a source or a library changes.
    Read it only; a test that alters a bundle copies it first.
    """
    folder = Path(request.config.cache.mkdir("tiny-bundles")) / _sources_digest()
    if not folder.exists():
        import dataclasses

        from fedmpt.export.bundle import PAPER_TRAINING, build_bundle
        from fedmpt.export.clip import load_clip

        training = dataclasses.replace(PAPER_TRAINING, batch_size=8, rounds=3)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            built = Path(scratch) / "bundle"
            clip = load_clip(str(request.getfixturevalue("tiny_clip")))
            build_bundle(clip, TINY_LABELS, built, conditions=TINY_CONDITIONS, training=training)
            with contextlib.suppress(OSError):  # another session may have been faster
                built.rename(folder)
    return folder


def _sources_digest() -> str:
    root = Path(__file__).resolve().parents[1]
    names = ("bundle", "clip", "frozen", "graphs", "methods", "programs", "prompts", "towers")
    paths = [Path(__file__), root / "kernels/reference.py", *(root / f"export/{name}.py" for name in names)]
    versions = [version(name) for name in ("torch", "transformers", "onnx", "onnxscript", "onnxruntime")]
    digest = hashlib.sha256(repr(versions).encode())
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


@pytest.fixture(scope="session")
def colour_tagger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tagger whose answers one can predict: labels red, green and blue, 32 px, heat maps 4 × 4.

    A label's probability is the mean of its channel; its heat map says where in the photo the channel is.
    """
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    from fedmpt.export.tagger import save_tagger
    from fedmpt.protocol.tagger_info import FORMAT, PREPROCESSING, VERSION, Measurement, TaggerInfo

    nodes = [
        helper.make_node("Cast", ["pixels"], ["levels"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["levels"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node("AveragePool", ["planes"], ["cells"], kernel_shape=[8, 8], strides=[8, 8]),
        helper.make_node("Div", ["cells", "white"], ["shares"]),
        helper.make_node("ReduceMean", ["shares", "axes"], ["probabilities"], keepdims=0),
        helper.make_node("ReduceSum", ["cells", "axes"], ["sums"], keepdims=1),
        helper.make_node("Max", ["sums", "one"], ["totals"]),
        helper.make_node("Div", ["cells", "totals"], ["heatmaps"]),
    ]
    graph = helper.make_graph(
        nodes,
        "colours",
        [helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["batch", 32, 32, 3])],
        [
            helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["batch", 3]),
            helper.make_tensor_value_info("heatmaps", TensorProto.FLOAT, ["batch", 3, 4, 4]),
        ],
        [
            numpy_helper.from_array(np.array(255, np.float32), "white"),
            numpy_helper.from_array(np.array(1, np.float32), "one"),
            numpy_helper.from_array(np.array([2, 3]), "axes"),
        ],
    )
    info = TaggerInfo(
        format=FORMAT,
        version=VERSION,
        labels=("red", "green", "blue"),
        thresholds=(0.5, 0.5, 0.25),
        temperature=1.0,
        image_size=32,
        preprocessing=PREPROCESSING,
        grid=(4, 4),
        precision="float32",
        method="colours",
        clip="none",
        licence="none",
        state_digest="0" * 64,
        bundle_digest="0" * 64,
        provenance={},
        measurement=Measurement(),
    )
    path = tmp_path_factory.mktemp("colours") / "tagger.onnx"
    save_tagger(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), info, path
    )
    return path


def write_tiny_clip(
    folder: Path,
    *,
    image_size: int = 48,
    layers: int = 2,
    width: int = 32,
    activation: str = "quick_gelu",
    end: int | None = None,
    positions: int = 77,
) -> Path:
    """Save a seeded random ``CLIPModel`` with a byte-level ``CLIPTokenizer`` and a preprocessor file.

    ``end`` is the configuration's ``eos_token_id`` (None: the tokenizer's; 2: as in old checkpoints).
    """
    import torch
    import transformers

    vocabulary = write_tokenizer(folder)
    tower = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "hidden_act": activation,
    }
    config = transformers.CLIPConfig(
        text_config=tower
        | {
            "vocab_size": vocabulary,
            "max_position_embeddings": positions,
            "bos_token_id": vocabulary - 2,
            "eos_token_id": vocabulary - 1 if end is None else end,
            "pad_token_id": vocabulary - 1,
        },
        vision_config=tower | {"image_size": image_size, "patch_size": 16},
        projection_dim=24,
    )
    torch.manual_seed(0)
    model = transformers.CLIPModel(config)
    for parameter in model.parameters():
        # The stock initialisation is so small that towers of this size are nearly constant.
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(folder)
    return folder


def grow(word: str) -> list[str]:
    """The byte-pair merges that build a word from its left."""
    return [f"{word[:end]} {word[end]}" + "</w>" * (end == len(word) - 1) for end in range(1, len(word))]


def write_tokenizer(folder: Path) -> int:
    """Write a ``CLIPTokenizer`` that knows every byte and a few words; return the size of its vocabulary."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(code) for code in printable] + [chr(256 + index) for index in range(256 - len(printable))]
    merges = list(dict.fromkeys(merge for word in WORDS for merge in grow(word)))
    pieces = [
        *letters,
        *(f"{letter}</w>" for letter in letters),
        *(merge.replace(" ", "") for merge in merges),
    ]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}))
    preprocessor = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 48}}
    preprocessor |= {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return len(vocabulary)


def find_free_port() -> int:
    """A TCP port on loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def free_port() -> Callable[[], int]:
    """``find_free_port``, for tests that start a server of their own."""
    return find_free_port


@pytest.fixture(scope="session")
def mosquitto_program() -> str:
    """The path of mosquitto; the test is skipped where it is not installed."""
    if MOSQUITTO is None:
        pytest.skip("mosquitto is not installed (apt install mosquitto)")
    return MOSQUITTO


class Mosquitto:
    """A real broker on a free loopback port; ``start`` again after ``kill`` keeps the port.

    It keeps sessions and retained messages too if it is ``persistent``.
    """

    def __init__(self, program: str, folder: Path, options: str, persistent: bool) -> None:
        self.port = find_free_port()
        self.url = f"mqtt://127.0.0.1:{self.port}"
        self.configuration = folder / "mosquitto.conf"
        self._program = program
        self._log = folder / "mosquitto.log"
        if persistent:
            options += f"\npersistence true\npersistence_location {folder}/\nautosave_interval 1\n"
            options += "autosave_on_changes true"
        # As root, mosquitto changes to an account that cannot read the test's private folder.
        self.configuration.write_text(
            f"listener {self.port} 127.0.0.1\nallow_anonymous true\nuser {getpass.getuser()}\n"
            f"log_dest file {self._log}\n{options}\n"
        )
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start and wait until it accepts connections."""
        self._process = subprocess.Popen([self._program, "-c", str(self.configuration)])
        for _ in range(200):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            time.sleep(0.05)
        raise AssertionError(self._log.read_text() if self._log.exists() else "mosquitto did not start")

    def kill(self) -> None:
        """SIGKILL."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()


@pytest.fixture
def start_mosquitto(tmp_path: Path, mosquitto_program: str) -> Iterator[Callable[..., Mosquitto]]:
    """Starts a mosquitto, with lines for its configuration where wanted; killed after the test."""
    with contextlib.ExitStack() as running:

        def start(options: str = "", *, persistent: bool = True) -> Mosquitto:
            broker = Mosquitto(mosquitto_program, tmp_path, options, persistent)
            running.callback(broker.kill)
            broker.start()
            return broker

        yield start


@pytest.fixture
def mosquitto(start_mosquitto: Callable[..., Mosquitto]) -> Mosquitto:
    """A real broker on a free loopback port."""
    return start_mosquitto()
