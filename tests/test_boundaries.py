"""Who may import whom: the table of the design, enforced on the source."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fedmpt.cli.main import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
WATCHED = {"torch", "triton", "transformers", "onnx", "onnxruntime"}
FOLDERS = {"kernels", "export", "edge_client", "aggregator", "protocol", "simulation", "cli"}
MAY_IMPORT = {
    "kernels": {"torch", "triton"},
    "export": {"kernels", "protocol", "torch", "transformers", "onnx", "onnxruntime"},
    "edge_client": {"protocol", "onnxruntime"},
    "aggregator": {"protocol"},
    "protocol": set(),
    "simulation": {"edge_client", "aggregator", "export", "protocol"},
    "cli": FOLDERS | WATCHED,
}
# The two places that need PyTorch by their nature: the torch engine, and the training of the micro-CLIP.
MAY_ALSO_IMPORT = {
    "edge_client/torch_engine.py": {"export", "kernels", "torch"},
    "simulation/micro_clip": {"torch", "transformers"},
}


def imported(source: str) -> set[str]:
    """The watched packages and folders of ours that a module imports, anywhere in its text."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import: write fedmpt.… in full"
            module = node.module or ""
            names.update(f"{module}.{alias.name}" for alias in node.names)
    result = set()
    for name in names:
        parts = name.split(".")
        if parts[0] in WATCHED:
            result.add(parts[0])
        elif parts[0] == "fedmpt" and len(parts) > 1:
            result.add(parts[1])
    return result


@pytest.mark.parametrize(
    "path", sorted(path for folder in FOLDERS for path in (ROOT / folder).glob("*.py")), ids=str
)
def test_a_module_imports_only_what_the_design_allows(path: Path) -> None:
    folder = path.parent.name
    allowed = MAY_IMPORT[folder] | {folder}
    for prefix, more in MAY_ALSO_IMPORT.items():
        if str(path.relative_to(ROOT)).startswith(prefix):
            allowed |= more
    assert imported(path.read_text()) <= allowed


def test_the_check_sees_an_import_inside_a_function() -> None:
    assert imported("def f():\n    from fedmpt.export import bundle\n    import torch.nn") == {
        "export",
        "torch",
    }


@pytest.mark.parametrize("folder", sorted(FOLDERS - {"cli", "kernels"}))
def test_importing_a_package_loads_nothing_heavy(folder: str) -> None:
    code = f"import sys, fedmpt.{folder}; print(*sorted(set(sys.modules) & {WATCHED!r}))"
    output = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    assert output.stdout.split() == []


def test_every_module_stands_in_the_table_of_the_architecture() -> None:
    table = (ROOT / "docs" / "architecture.md").read_text().split("| module | offers |")[1].split("\n\n")[0]
    listed = set()
    for row in table.splitlines():
        names = re.findall(r"`([\w/]+\.py)`", row.split("|")[1]) if "|" in row else []
        listed |= {name if "/" in name else f"{Path(names[0]).parent}/{name}" for name in names}
    commands = {f"cli/{name}.py" for name in COMMANDS}
    modules = {str(path.relative_to(ROOT)) for folder in FOLDERS for path in (ROOT / folder).glob("[!_]*.py")}
    assert listed == modules - commands


def test_every_folder_with_modules_is_packaged() -> None:
    packaged = (ROOT / "pyproject.toml").read_text()
    for folder in FOLDERS:
        assert f'"fedmpt.{folder}" = "{folder}"' in packaged
        assert (ROOT / folder / "py.typed").exists()
    found = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert found == FOLDERS
