"""What a micro-CLIP's training keeps on disk to go on after an interruption: its checkpoint and its curve."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from fedmpt.protocol.errors import FedmptError
from fedmpt.protocol.files import write_atomically

HEADER = "step,loss,seconds"
STATE = ("step", "exp_avg", "exp_avg_sq")  # AdamW's, of every parameter that has had a gradient


class CheckpointError(FedmptError):
    """A checkpoint that cannot be continued."""


def save_checkpoint(
    path: Path,
    parameters: Mapping[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    step: int,
    origin: Mapping[str, str],
) -> None:
    """Write weights, the optimiser's state and `step`; `origin` is what a training that goes on must share."""
    tensors = {f"weight.{name}": parameter.detach() for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        state = optimizer.state.get(parameter, {})
        tensors |= {f"{key}.{name}": value for key, value in state.items()}
    metadata = {"step": str(step), **origin, **_machine()}
    write_atomically(path, save({k: v.contiguous().clone() for k, v in tensors.items()}, metadata))


def load_checkpoint(
    path: Path,
    parameters: Mapping[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    origin: Mapping[str, str],
) -> int:
    """Read weights and the optimiser's state into their places; returns the step.

    Says so on stderr where threads or PyTorch differ, since bits will.

    :raises CheckpointError: of another origin, of an older version, or no whole checkpoint
    """
    try:
        with safe_open(path, "pt") as file:
            metadata, names = file.metadata() or {}, set(file.keys())
            for what in origin:
                if metadata[what] != origin[what]:
                    raise CheckpointError(f"{path}: trained with another {what}; train into another folder")
            for name, parameter in parameters.items():
                parameter.data.copy_(file.get_tensor(f"weight.{name}"))
                state = {key: file.get_tensor(f"{key}.{name}") for key in STATE if f"{key}.{name}" in names}
                if state:  # anchors have none before a stage that wants them, and their own step after
                    optimizer.state[parameter] = state
            step, then = int(metadata["step"]), {key: metadata[key] for key in _machine()}
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        reason = f"it says no {error}" if isinstance(error, KeyError) else error
        raise CheckpointError(
            f"{path}: damaged, or no checkpoint of this version ({reason}); delete it to begin anew, or train "
            "into another folder"
        ) from error
    if then != _machine():
        was, now = (" and ".join(f"{key} {value}" for key, value in m.items()) for m in (then, _machine()))
        print(
            f"{path}: trained with {was}, goes on with {now}: weights will differ slightly", file=sys.stderr
        )
    return step


def _machine() -> dict[str, str]:
    """What changes the weights in their last bits only."""
    return {"threads": str(torch.get_num_threads()), "torch": str(torch.__version__)}


class Curve:
    """The mean loss and the seconds of training so far, in rows; those beyond `step` are dropped."""

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        lines = path.read_text("utf-8", "replace").splitlines()[1:] if step and path.exists() else []
        try:
            self.rows = [line for line in lines if int(line.split(",")[0]) <= step]
            seconds = float(self.rows[-1].split(",")[2]) if self.rows else 0.0
        except (ValueError, IndexError) as error:
            raise CheckpointError(f"{path}: no curve of a training ({error}); delete or rename it") from error
        self.begun = time.monotonic() - seconds

    def add(self, step: int, loss: float) -> str:
        """Add a row; returns it in words."""
        seconds = time.monotonic() - self.begun
        self.rows.append(f"{step},{loss:.4f},{seconds:.0f}")
        return f"loss {loss:.4f}, {seconds:.0f} s"

    def write(self) -> None:
        """Replace the file by the rows."""
        write_atomically(self.path, "\n".join([HEADER, *self.rows]) + "\n")
