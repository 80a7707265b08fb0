"""Options that commands share, what must hold before they work, and the TOML file of aggregator and client.

    [aggregator]
    bundle = "bundle"
    broker = "mqtts://hub.example.org"
    rounds = 20

    [client]
    name = "site-a"

A key is a long option's name without its dashes. What is given on the command line wins. Paths in the file are
relative to the file.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import errno
import importlib.util
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from fedmpt.protocol.address import BrokerAddress, parse_broker
from fedmpt.protocol.codec import CodecError, State, load_state
from fedmpt.protocol.errors import FedmptError
from fedmpt.protocol.manifest import BundleManifest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TABLES = ("aggregator", "client")
MAXIMUM_CONFIG_BYTES = 1 << 20


class OptionsError(FedmptError):
    """The configuration file cannot be read, or a key or value in it is wrong."""


def add_broker_options(parser: argparse.ArgumentParser, who: str) -> None:
    """Add ``--broker`` with its TLS files; :func:`broker_address` reads them. ``who`` shows the certificate."""
    parser.add_argument("--broker", metavar="URL", help="mqtt://host:1883, or mqtts://host:8883 for TLS")
    parser.add_argument(
        "--ca", type=Path, metavar="PEM", help="authority that signed the broker's certificate"
    )
    parser.add_argument("--cert", type=Path, metavar="PEM", help=f"{who}'s certificate")
    parser.add_argument("--key", type=Path, metavar="PEM", help="its private key")


def broker_address(arguments: argparse.Namespace) -> BrokerAddress:
    """The broker to use, with FEDMPT_MQTT_USERNAME and FEDMPT_MQTT_PASSWORD of the environment."""
    address = parse_broker(
        arguments.broker, authority=arguments.ca, certificate=arguments.cert, key=arguments.key
    )
    return dataclasses.replace(
        address,
        username=os.environ.get("FEDMPT_MQTT_USERNAME", address.username),
        password=os.environ.get("FEDMPT_MQTT_PASSWORD"),
    )


def load_tuned_state(path: Path, bundle: BundleManifest) -> State:
    """The state that a user gives for a bundle.

    Raises:
        CodecError: missing, unreadable, or not a state of such a bundle.
    """
    try:
        return load_state(path, bundle.state)
    except CodecError as error:
        if error.check == "file":
            raise
        raise CodecError(error.check, f"{error}. Is it a state that was tuned with this bundle?") from error


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
            file.write(bytes(4096))
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def allow_config(parser: argparse.ArgumentParser, table: str) -> None:
    """Add ``--config``; call it after all other options, and :func:`resolve` first thing in ``run``."""
    actions = {action.dest: action for action in parser._actions if action.option_strings}
    del actions["help"]
    defaults = {name: action.default for name, action in actions.items()}
    required = [name for name, action in actions.items() if action.required]
    for action in actions.values():
        # Left out of the parsed arguments unless given, so that the file's values can be told from defaults.
        action.help = (action.help or "").replace("%(default)s", str(action.default))
        action.default = argparse.SUPPRESS
        action.required = False
    parser.add_argument(
        "--config", type=Path, metavar="TOML", help=f"read options from the table [{table}] of this file"
    )
    parser.set_defaults(_config=(parser, table, actions, defaults, required))


def resolve(arguments: argparse.Namespace) -> argparse.Namespace:
    """Command line over configuration file over defaults; ends with usage (exit 2) if an option is missing.

    Raises:
        OptionsError: the file cannot be read, or holds an unknown table or key, or a value that is no option's.
    """
    parser, table, actions, defaults, required = arguments._config
    given = {name: value for name, value in vars(arguments).items() if name != "_config"}
    from_file = _read(arguments.config, table, actions) if arguments.config else {}
    missing = [name for name in required if name not in given and name not in from_file]
    if missing:
        names = ", ".join(actions[name].option_strings[-1] for name in missing)
        parser.error(f"the following arguments are required: {names}")
    return argparse.Namespace(**(defaults | from_file | given))


def _read(path: Path, table: str, actions: dict[str, argparse.Action]) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            text = file.read(MAXIMUM_CONFIG_BYTES + 1)
        if len(text) > MAXIMUM_CONFIG_BYTES:
            raise OptionsError(f"{path}: larger than {MAXIMUM_CONFIG_BYTES} bytes; this is no configuration")
        content = tomllib.loads(text.decode())
    except OSError as error:
        raise OptionsError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise OptionsError(f"{path}: not valid TOML ({error})") from error
    for name in content:
        if name not in TABLES:
            raise OptionsError(f"{path}: table [{name}] is unknown; {_nearest(name, TABLES)}")
    values = content.get(table, {})
    if not isinstance(values, dict):
        raise OptionsError(f"{path}: {table} is no table; write [{table}]")
    options = {name.replace("_", "-"): action for name, action in actions.items()}
    result = {}
    for key, value in values.items():
        if key.replace("_", "-") not in options:
            raise OptionsError(f"{path}: [{table}] {key} is unknown; {_nearest(key, list(options))}")
        action = options[key.replace("_", "-")]
        result[action.dest] = _convert(action, value, path, f"{path}: [{table}] {key}")
    return result


def _convert(action: argparse.Action, value: Any, path: Path, where: str) -> Any:
    """The value that the command line would have given."""
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise OptionsError(f"{where}: write true or false")
        return value
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise OptionsError(f"{where}: expected a text or a number, got {value!r}")
    kind: Any = action.type or str
    if kind is Path:
        return path.parent / str(value)
    try:
        converted = kind(str(value))
    except (argparse.ArgumentTypeError, ValueError, TypeError) as error:
        raise OptionsError(f"{where}: {value!r} cannot be used ({error})") from None
    if action.choices is not None and converted not in action.choices:
        raise OptionsError(f"{where}: {value!r} is none of {', '.join(map(str, action.choices))}")
    return converted


def _nearest(name: str, known: list[str] | tuple[str, ...]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
