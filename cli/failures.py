"""Failures of the system rather than of the input: full disks, forbidden places, packages that are not installed."""

from __future__ import annotations

import errno
import importlib.util
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

# Top-level module → the extra of this package that brings it.
EXTRAS = {
    "onnxruntime": "cpu",
    "dp_accounting": "privacy",
    "distributed": "cluster",
    "matplotlib": "workstation",
    "onnxscript": "workstation",
    "scipy": "workstation",
    "sklearn": "workstation",
    "torch": "workstation",
    "transformers": "workstation",
    "triton": "workstation",
}
_ROOM = "free some space and run it again"
_PERMISSION = "give a place that you may use, or change its owner or permissions"
_FOLDER = "a file is where a folder is to be; give another path"
REMEDIES = {
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: _ROOM,
    errno.EFBIG: "raise the limit on the size of files (ulimit -f) and run it again",
    errno.EACCES: _PERMISSION,
    errno.EPERM: _PERMISSION,
    errno.EROFS: _PERMISSION,
    errno.EEXIST: _FOLDER,
    errno.ENOTDIR: _FOLDER,
    errno.EISDIR: "give the path of a file",
    errno.ENOENT: "check the path",
    errno.EADDRINUSE: "another process has this port; end it, or give another port",
}
_BLOCK = 4096


def explain_os_error(error: OSError, outputs: Sequence[object]) -> str:
    """Where it happened, what went wrong and what to do; ``outputs``: where, if the error itself does not know."""
    place = error.filename or " or ".join(map(str, outputs))
    if not place:
        return str(error)
    text = f"{place}: {error.strerror or error}"
    return f"{text}; {REMEDIES[error.errno]}" if error.errno in REMEDIES else text


def explain_missing_module(error: ModuleNotFoundError) -> str | None:
    """Which extra brings the module; None where no extra does, so that it is a fault of this program."""
    name = (error.name or "").partition(".")[0]
    if name not in EXTRAS:
        return None
    return f"{name} is not installed; run: pip install 'fedmpt-edge[{EXTRAS[name]}]'"


def require_modules(*names: str) -> None:
    """Raise ModuleNotFoundError now, and not after hours of work, if one cannot be imported."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def require_writable(path: Path) -> None:
    """Raise OSError now, and not after hours of work, if the file cannot be written; leaves nothing behind."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(_BLOCK))
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
