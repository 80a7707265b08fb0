"""Opens ONNX graphs with ONNX Runtime on a device that is chosen, checked and stated."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from fedmpt.protocol.errors import FedmptError
from fedmpt.protocol.onnx_file import OnnxFileError, check_external_data

DEVICES = ("auto", "cpu", "cuda", "tensorrt")
PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
GPU_FILES = ("/dev/nvidia0", "/dev/nvhost-gpu", "/dev/nvgpu", "/dev/dxg")
CONFINED = (1, 24, 1)  # from this version on ONNX Runtime reads no file outside a graph's folder
REINSTALL = "pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'fedmpt-edge[cpu]'  (or [gpu])"

logger = logging.getLogger(__name__)


class SessionError(FedmptError):
    """ONNX Runtime is missing or installed twice, or cannot run a graph on the device that was asked for."""


def open_session(
    path: Path,
    device: str = "auto",
    threads: int | None = None,
    *,
    files: Collection[str] = (),
    apart: bool = False,
    plan_memory: bool = True,
) -> Any:
    """Open a graph as an ``onnxruntime.InferenceSession`` and log which device really runs it, and why.

    Args:
        path: the ONNX file.
        device: ``cpu``, ``cuda`` or ``tensorrt`` (or an error, never another device silently); ``auto`` takes
            CUDA where it works and the CPU where not. TensorRT is never taken unasked: it compiles for minutes.
        threads: CPU threads; all cores that this process may use where None.
        files: names of the files beside the graph from which it may read weights; everything else is refused before
            ONNX Runtime sees the graph.
        apart: on a CPU, each run keeps to its caller's core, so that as many callers as there are threads waste no time
            in waiting for the slowest core in every operation.
        plan_memory: lay out each run's tensors in one block beforehand, and keep weights repacked for products.
            Without both, a train step of three ViT-B/16 blocks took 115 instead of 248 MB, and no longer.

    Raises:
        SessionError: no or two ONNX Runtimes installed, the device cannot be had, or the graph cannot be opened or
            would read other files.
    """
    if device not in DEVICES:
        raise SessionError(f"device {device!r} is unknown; use one of {', '.join(DEVICES)}")
    onnxruntime = import_onnxruntime()
    try:
        check_external_data(path, files)
    except OnnxFileError as error:
        raise SessionError(str(error)) from error
    count = threads or len(os.sched_getaffinity(0))
    options = onnxruntime.SessionOptions()
    options.inter_op_num_threads = 1
    options.use_deterministic_compute = True
    options.enable_mem_pattern = plan_memory
    if not plan_memory:  # weights then stay in the pages of their file, which the kernel may drop
        options.add_session_config_entry("session.disable_prepacking", "1")
    # Whatever the file's name: what was checked is what is opened.
    options.add_session_config_entry("session.load_model_format", "ONNX")
    options.log_severity_level = 3  # the fallbacks that it warns of are checked and told below
    wanted = "cuda" if device == "auto" else device
    obstacle = _obstacle(onnxruntime, wanted)
    if obstacle and device != "auto":
        raise SessionError(f"--device {device}: {obstacle}")
    names = {"cpu": ("cpu",), "cuda": ("cuda", "cpu"), "tensorrt": ("tensorrt", "cuda", "cpu")}
    chosen = names["cpu" if obstacle else wanted]
    options.intra_op_num_threads = 1 if apart and chosen == ("cpu",) else count
    try:
        session = onnxruntime.InferenceSession(
            str(path), options, providers=[(PROVIDERS[name], _provider_options(name)) for name in chosen]
        )
    except Exception as error:  # its exceptions share no base class but this
        reason = " ".join(str(error).split())
        raise SessionError(
            f"{path}: ONNX Runtime cannot open it ({reason}); copy the file again, or make it anew"
        ) from error
    used = session_device(session)
    if used != chosen[0]:  # the provider's libraries did not load, and it fell back on its own
        obstacle = (
            f"ONNX Runtime's {chosen[0].upper()} provider did not start; are CUDA {_cuda_version(onnxruntime)} "
            "and cuDNN installed and the driver recent enough? `fedmpt doctor` tells more"
        )
        if device != "auto":
            raise SessionError(f"--device {device}: {obstacle}")
    if obstacle and not has_nvidia_gpu():
        obstacle = "there is no NVIDIA GPU here"
    remark = f", not on CUDA: {obstacle}" if obstacle else ""
    level = logging.WARNING if obstacle and has_nvidia_gpu() else logging.INFO
    logger.log(level, "%s runs on %s%s", path.name, describe(used, count), remark)
    return session


def is_confined(onnxruntime: Any) -> bool:
    """Whether this ONNX Runtime itself refuses external data outside a graph's folder."""
    numbers = re.findall(r"\d+", onnxruntime.__version__)[:3]
    return tuple(map(int, numbers)) >= CONFINED


def session_device(session: Any) -> str:
    """The device that a session really uses: ``cpu``, ``cuda`` or ``tensorrt``."""
    first = session.get_providers()[0]
    return next(name for name, provider in PROVIDERS.items() if provider == first)


def describe(device: str, threads: int) -> str:
    """A device in words, such as ``CPU (2 threads)``."""
    return f"CPU ({threads} threads)" if device == "cpu" else device.upper()


def has_nvidia_gpu() -> bool:
    """Whether the kernel shows an NVIDIA GPU: a card, a Jetson's, or Windows' through WSL."""
    return any(Path(name).exists() for name in GPU_FILES)


def import_onnxruntime() -> Any:
    """Import ONNX Runtime, if exactly one of its packages is installed.

    ``onnxruntime`` and ``onnxruntime-gpu`` fill the same folder: with both, which one runs is chance.

    Raises:
        SessionError: none, both, or the remains of one are installed; the text has the command that mends it.
    """
    installed = [name for name in ("onnxruntime", "onnxruntime-gpu") if _installed(name)]
    if len(installed) > 1:
        raise SessionError(f"onnxruntime and onnxruntime-gpu are both installed; run: {REINSTALL}")
    try:
        import onnxruntime
    except ImportError as error:
        cause = f"does not load ({error})" if installed else "is not installed"
        remedy = REINSTALL if installed else "pip install 'fedmpt-edge[cpu]'  (or [gpu] for NVIDIA)"
        raise SessionError(f"ONNX Runtime {cause}; run: {remedy}") from error
    if not hasattr(onnxruntime, "InferenceSession"):  # what uninstalling one of two leaves behind
        raise SessionError(f"ONNX Runtime is damaged: its package is incomplete; run: {REINSTALL}")
    return onnxruntime


def _obstacle(onnxruntime: Any, device: str) -> str | None:
    """Why a device cannot be used here, as far as can be told before trying."""
    if PROVIDERS[device] in onnxruntime.get_available_providers():
        return None
    return (
        f"this ONNX Runtime ({onnxruntime.__version__}) is built without {device.upper()}; for an NVIDIA GPU run: "
        "pip uninstall -y onnxruntime && pip install 'fedmpt-edge[gpu]'  (Jetson: from NVIDIA's package index)"
    )


def _provider_options(name: str) -> dict[str, str]:
    if name == "cuda":
        # TF32 would keep 10 bits of mantissa: features and gradients would differ from the CPU's.
        return {"use_tf32": "0"}
    if name == "tensorrt":
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedmpt" / "tensorrt"
        cache.mkdir(parents=True, exist_ok=True)
        return {"trt_engine_cache_enable": "1", "trt_engine_cache_path": str(cache)}
    return {}


def _cuda_version(onnxruntime: Any) -> str:
    return str(getattr(onnxruntime, "cuda_version", "") or "of its release notes")


def _installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
