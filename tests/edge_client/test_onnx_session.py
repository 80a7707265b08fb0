"""ONNX Runtime: exactly one package, the device that was asked for, and no silent fallback."""

import importlib.metadata
import logging
import os
import subprocess
import sys
import types

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from fedmpt.edge_client import onnx_session
from fedmpt.edge_client.onnx_session import SessionError, import_onnxruntime, open_session, session_device


@pytest.fixture
def graph(tmp_path):
    """y = x + x."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n"])
    body = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "double", [x], [y])
    path = tmp_path / "double.onnx"
    onnx.save(helper.make_model(body, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return path


def pretend_installed(monkeypatch, *names):
    def version(name):
        if name not in names:
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.20"

    monkeypatch.setattr(importlib.metadata, "version", version)


def pretend_providers(monkeypatch, available, used):
    """An ONNX Runtime with these providers whose sessions end up on ``used``; it records what was asked for."""
    import onnxruntime

    asked = []

    class Session:
        def __init__(self, path, options, providers):
            asked.append([name for name, _ in providers])

        def get_providers(self):
            return used

    fake = types.SimpleNamespace(
        __version__="1.99",
        cuda_version="12.8",
        SessionOptions=onnxruntime.SessionOptions,
        InferenceSession=Session,
        get_available_providers=lambda: available,
    )
    monkeypatch.setitem(sys.modules, "onnxruntime", fake)
    return asked


CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"


def test_a_graph_runs_on_the_cpu_with_the_threads_asked_for(graph):
    session = open_session(graph, "cpu", 1)
    assert session.get_session_options().intra_op_num_threads == 1
    assert session_device(session) == "cpu"
    assert session.run(None, {"x": np.float32([1, 2])})[0].tolist() == [2, 4]


def test_says_what_runs_where_and_why_not_elsewhere(graph, caplog, monkeypatch):
    monkeypatch.setattr(onnx_session, "GPU_FILES", ())
    with caplog.at_level(logging.INFO, "fedmpt"):
        open_session(graph, "auto", 2)
    assert caplog.messages == [
        "double.onnx runs on CPU (2 threads), not on CUDA: there is no NVIDIA GPU here"
    ]


def test_warns_with_the_remedy_where_a_gpu_stays_idle(graph, caplog, monkeypatch, tmp_path):
    monkeypatch.setattr(onnx_session, "GPU_FILES", (str(tmp_path),))
    pretend_providers(monkeypatch, [CPU], [CPU])
    open_session(graph, "auto", 2)
    assert caplog.records[0].levelno == logging.WARNING
    assert "built without CUDA" in caplog.text
    assert "pip install 'fedmpt-edge[gpu]'" in caplog.text


@pytest.mark.parametrize("device", ["cuda", "tensorrt"])
def test_a_device_that_was_asked_for_and_is_not_built_in_is_an_error(graph, device, monkeypatch):
    pretend_providers(monkeypatch, [CPU], [CPU])
    with pytest.raises(
        SessionError, match=rf"--device {device}: .*built without {device.upper()}.*pip install"
    ):
        open_session(graph, device)


def test_a_provider_that_falls_back_silently_is_an_error(graph, monkeypatch):
    pretend_providers(monkeypatch, [CUDA, CPU], [CPU])
    with pytest.raises(
        SessionError, match=r"CUDA provider did not start; are CUDA 12\.8 and cuDNN installed"
    ):
        open_session(graph, "cuda")


def test_auto_takes_cuda_where_it_works_and_never_tensorrt(graph, monkeypatch):
    asked = pretend_providers(monkeypatch, [TENSORRT, CUDA, CPU], [CUDA, CPU])
    assert session_device(open_session(graph, "auto")) == "cuda"
    assert asked == [[CUDA, CPU]]


def test_tensorrt_falls_back_to_cuda_node_by_node(graph, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    asked = pretend_providers(monkeypatch, [TENSORRT, CUDA, CPU], [TENSORRT, CUDA, CPU])
    assert session_device(open_session(graph, "tensorrt")) == "tensorrt"
    assert asked == [[TENSORRT, CUDA, CPU]]
    assert (tmp_path / "fedmpt" / "tensorrt").is_dir()


def test_an_unknown_device_is_an_error(graph):
    with pytest.raises(SessionError, match="device 'tpu' is unknown; use one of auto, cpu, cuda, tensorrt"):
        open_session(graph, "tpu")


def test_a_file_that_is_no_graph_is_an_error_that_names_it(tmp_path):
    (tmp_path / "bad.onnx").write_bytes(b"not a graph")
    with pytest.raises(SessionError, match=r"bad\.onnx: ONNX Runtime cannot open it"):
        open_session(tmp_path / "bad.onnx")


@pytest.mark.parametrize(
    "module",
    ["edge_client.onnx_session", "export.tagger_graph", "export.tagger_precision", "export.verification"],
)
def test_no_module_lets_onnx_runtime_report_to_its_maker(graph, tmp_path, module):
    if module.startswith("export."):
        pytest.importorskip("torch")
    program = (
        f"import fedmpt.{module}, onnxruntime;"
        f"onnxruntime.InferenceSession({str(graph)!r}, providers=['CPUExecutionProvider'])"
    )
    kept = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    home = {"HOME": str(tmp_path / "home"), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    subprocess.run([sys.executable, "-c", program], env=kept | home, check=True)
    assert not list(tmp_path.rglob("Microsoft"))


def test_both_packages_installed_stops_with_the_command_that_mends_it(monkeypatch):
    pretend_installed(monkeypatch, "onnxruntime", "onnxruntime-gpu")
    with pytest.raises(
        SessionError, match="both installed; run: pip uninstall -y onnxruntime onnxruntime-gpu &&"
    ):
        import_onnxruntime()


def test_no_package_installed_stops_with_the_command_that_mends_it(monkeypatch):
    pretend_installed(monkeypatch)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(SessionError, match=r"is not installed; run: pip install 'fedmpt-edge\[cpu\]'"):
        import_onnxruntime()


def test_the_remains_of_an_uninstalled_package_stop_with_the_command(monkeypatch):
    pretend_installed(monkeypatch, "onnxruntime-gpu")
    monkeypatch.setitem(sys.modules, "onnxruntime", types.ModuleType("onnxruntime"))
    with pytest.raises(SessionError, match=r"damaged.*run: pip uninstall"):
        import_onnxruntime()
