"""The edge stays light: none of its modules needs PyTorch, transformers or onnx, and ONNX Runtime comes when used."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_importing_every_edge_module_loads_nothing_heavy():
    modules = [path.stem for path in (ROOT / "edge_client").glob("*.py") if path.stem != "torch_engine"]
    assert {"cache", "client", "evaluation", "onnx_engine", "tagger"} <= set(modules)
    code = "import importlib, sys\n"
    code += "".join(f"importlib.import_module('fedmpt.edge_client.{name}')\n" for name in modules)
    code += "print(*{'torch', 'triton', 'transformers', 'onnx', 'onnxruntime'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_building_and_evaluating_loads_no_pytorch(tiny_bundle, tmp_path):
    """The whole way from a photo to its figures, in a fresh interpreter that refuses the heavy packages."""
    code = f"""
import sys
for name in ("torch", "triton", "transformers", "onnx"):
    sys.modules[name] = None
from pathlib import Path
from PIL import Image
folder = Path({str(tmp_path)!r})
Image.new("RGB", (60, 60), "red").save(folder / "a.png")
(folder / "labels.csv").write_text("path,labels\\na.png,cat\\n")
from fedmpt.cli import main
bundle, cache = {str(tiny_bundle)!r}, str(folder / "cache")
assert main(["cache", str(folder), "--bundle", bundle, "--out", cache]) == 0
assert main(["evaluate", "--bundle", bundle, "--cache", cache]) == 0
"""
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "cat: 1.0000" in done.stdout
