"""``fedmpt conditions``: derive conditions for a list of labels with a language model."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from fedmpt.cli.bundle import read_lines
from fedmpt.cli.options import require_writable
from fedmpt.cli.progress import progress_bar
from fedmpt.export.conditions import DEFAULT_CONDITIONS, ConditionsError, Endpoint, derive_conditions
from fedmpt.protocol.files import write_atomically


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.epilog = (
        "Example: fedmpt conditions --labels labels.txt --endpoint http://localhost:11434/v1 "
        "--model qwen3 --out conditions.txt\n\n"
        "The key, if the server wants one, is read from the environment variable OPENAI_API_KEY. Without\n"
        "--endpoint, and where the model's answers cannot be used, the default list is written."
    )
    parser.add_argument("--labels", required=True, type=Path, help="text file, one label per line")
    parser.add_argument("--out", required=True, type=Path, help="text file to write, one condition per line")
    parser.add_argument("--endpoint", metavar="URL", help="OpenAI-compatible server, up to and with /v1")
    parser.add_argument("--model", help="the model's name on that server")
    parser.add_argument("--count", type=int, default=5, help="number of conditions (default 5)")
    parser.add_argument("--seed", type=int, default=0, help="of the label combinations (default 0)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Write the list; return 1 if it had to be the default list against the caller's wish."""
    labels = read_lines(arguments.labels)
    if arguments.endpoint and not arguments.model:
        raise ConditionsError("--endpoint needs --model, the model's name on that server")
    if arguments.count < 1:
        raise ConditionsError(f"--count {arguments.count}: give at least 1")
    require_writable(arguments.out)
    conditions: tuple[str, ...] = DEFAULT_CONDITIONS
    source, failure = "default", None
    if arguments.endpoint:
        key = os.environ.get("OPENAI_API_KEY")
        endpoint = Endpoint(arguments.endpoint, arguments.model, key)
        try:
            with progress_bar("asking for conditions") as progress:
                conditions = derive_conditions(
                    labels,
                    arguments.count,
                    endpoint,
                    cache=cache_folder(),
                    seed=arguments.seed,
                    progress=progress,
                )
            source = arguments.model
        except ConditionsError as error:
            failure = str(error)
    write_atomically(arguments.out, "".join(f"{condition}\n" for condition in conditions))
    if arguments.json:
        print(json.dumps({"conditions": conditions, "source": source, "error": failure}, ensure_ascii=False))
    else:
        print("\n".join(conditions))
    if failure:
        print(f"fedmpt conditions: {failure}\n{arguments.out}: holds the default list now", file=sys.stderr)
    return 1 if failure else 0


def cache_folder() -> Path:
    """Where accepted answers are kept: the user's cache folder (``XDG_CACHE_HOME``)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedmpt" / "conditions"
