"""Gathers the subcommands of ``fedmpt``; each is imported only when it is called."""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import sys
from collections.abc import Sequence

from fedmpt.protocol.errors import FedmptError

# name → (module, one line of help). A module has configure(parser) and run(arguments) -> exit code.
COMMANDS = {
    "aggregator": ("fedmpt.cli.aggregator", "run the rounds of a federation"),
    "bundle": ("fedmpt.cli.bundle", "prepare a federation bundle from a CLIP checkpoint and labels"),
    "cache": ("fedmpt.cli.cache", "encode a site's labelled photos into a feature cache"),
    "certs": ("fedmpt.cli.certs", "make TLS certificates and the broker's configuration and ACL"),
    "client": ("fedmpt.cli.client", "train with a site's feature cache whenever a round asks for it"),
    "conditions": ("fedmpt.cli.conditions", "derive conditions for a list of labels with a language model"),
    "demo": ("fedmpt.cli.demo", "a whole federation on this machine, with a report"),
    "doctor": ("fedmpt.cli.doctor", "check versions, providers, broker, certificates, clock, disk, memory"),
    "evaluate": ("fedmpt.cli.evaluate", "measure a state on a feature cache"),
    "export": ("fedmpt.cli.export", "make one tagger.onnx of a bundle and a tuned state"),
    "simulate": ("fedmpt.cli.simulate", "run experiments with many clients in one process"),
    "status": ("fedmpt.cli.status", "show a running federation's round, clients and updates"),
    "tag": ("fedmpt.cli.tag", "tag photos with a tagger.onnx"),
}

# The options that say where a command writes.
OUTPUTS = ("out", "store", "state_dir", "journal", "explain")

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


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; return its exit code: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="fedmpt",
        description="Federated multi-label prompt tuning of CLIP on edge devices.",
        epilog="Example: fedmpt demo",
    )
    parser.add_argument("--version", action="version", version=_version())
    called = next((word for word in arguments if not word.startswith("-")), None)
    options = argparse.Namespace()
    try:
        _add_commands(parser, called)
        parser.parse_args(arguments, options)
        exit_code: int = options.run(options)
        sys.stdout.flush()
        return exit_code
    except FedmptError as error:
        problem = str(error)
    except KeyboardInterrupt:
        print(f"fedmpt {called}: interrupted", file=sys.stderr)
        return 130
    except OSError as error:
        outputs = [value for name in OUTPUTS if (value := vars(options).get(name))]
        if _give_up_output():
            outputs = ["standard output"]
        if isinstance(error, BrokenPipeError):  # whoever read our output went away: ``fedmpt tag … | head``
            return 1
        problem = _explain_os_error(error, outputs)
    except ModuleNotFoundError as error:
        explained = _explain_missing_module(error)
        if explained is None:
            raise
        problem = explained
    print(f"fedmpt {called}: {problem}", file=sys.stderr)
    return 1


def _add_commands(parser: argparse.ArgumentParser, called: str | None) -> None:
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (module_name, help_text) in COMMANDS.items():
        subparser = subparsers.add_parser(
            name, help=help_text, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        if name == called:
            module = importlib.import_module(module_name)
            module.configure(subparser)
            subparser.set_defaults(run=module.run)


def _give_up_output() -> bool:
    """Whether standard output takes no more; what waits for it is dropped, or the flush at exit fails again."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def _explain_os_error(error: OSError, outputs: Sequence[object]) -> str:
    """Where it happened, what went wrong and what to do; ``outputs``: where, if the error itself does not know."""
    place = error.filename or " or ".join(map(str, outputs))
    if not place:
        return str(error)
    text = f"{place}: {error.strerror or error}"
    return f"{text}; {REMEDIES[error.errno]}" if error.errno in REMEDIES else text


def _explain_missing_module(error: ModuleNotFoundError) -> str | None:
    """Which extra brings the module; None where no extra does, so that it is a fault of this program."""
    name = (error.name or "").partition(".")[0]
    if name not in EXTRAS:
        return None
    return f"{name} is not installed; run: pip install 'fedmpt-edge[{EXTRAS[name]}]'"


def _version() -> str:
    from importlib.metadata import version

    return f"fedmpt {version('fedmpt-edge')}"
