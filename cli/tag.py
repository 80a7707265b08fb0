"""``fedmpt tag``: labels for photos, as JSON, CSV or XMP sidecars; or as a local web page."""

from __future__ import annotations

import argparse
import contextlib
import functools
import glob
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from fedmpt.cli.progress import progress_bar
from fedmpt.edge_client import tag_results
from fedmpt.edge_client.heatmaps import write_explanations
from fedmpt.edge_client.images import PhotoError
from fedmpt.edge_client.sidecars import NAMINGS, write_sidecar
from fedmpt.edge_client.tag_journal import Journal
from fedmpt.edge_client.tagger import Tagger
from fedmpt.edge_client.tagging import Tagged, find_photos, is_service_folder, tag_photos, watch
from fedmpt.edge_client.xmp_packet import XmpError
from fedmpt.protocol.errors import FedmptError
from fedmpt.protocol.files import sha256_file

DESCRIPTION = """\
Tag photos offline. Photos are files, folders (with all below), glob patterns or - (names on standard input, one a
line). Results are JSON Lines, CSV rows or XMP sidecars; photos are never modified. Exit code 1 if any photo could not
be tagged.

digiKam, darktable and Immich read the sidecars. Lightroom reads sidecars of proprietary raw files only, which this
command does not take; of JPEG, TIFF, PNG and DNG it reads the file itself. exiftool puts the tags into copies:
  exiftool -tagsFromFile %d%f.%e.xmp '-XMP-dc:Subject+<XMP-dc:Subject' \\
    '-XMP-lr:HierarchicalSubject+<XMP-lr:HierarchicalSubject' -ext jpg -o tagged/ photos/
  exiftool -overwrite_original -sep '##' -tagsFromFile @ '-XMP-dc:Subject<${XMP-dc:Subject;NoDups}' \\
    '-XMP-lr:HierarchicalSubject<${XMP-lr:HierarchicalSubject;NoDups}' tagged/"""
WATCH_SECONDS = 2.0
EXPLANATION_SIZE = 448  # pixels
DRAWINGS_JOURNAL = ".journal"  # in the folder of --explain, so that it goes when that is removed


class TagError(FedmptError):
    """The options of ``fedmpt tag`` contradict each other or what is there."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``fedmpt tag``."""
    parser.description = DESCRIPTION
    parser.epilog = (
        "Examples:\n"
        "  fedmpt tag --tagger tagger.onnx photos/ --out tags.jsonl   (run again: goes on where it stopped)\n"
        "  fedmpt tag --tagger tagger.onnx photos/ --format xmp --journal photos.journal   (goes on likewise)\n"
        "  fedmpt tag --tagger tagger.onnx photos/ --format xmp --watch\n"
        "  fedmpt tag --tagger tagger.onnx --serve"
    )
    parser.add_argument("photos", nargs="*", metavar="PHOTO", help="file, folder, glob pattern or -")
    parser.add_argument("--tagger", type=Path, default=Path("tagger.onnx"), help="tagger file (%(default)s)")
    parser.add_argument("--format", choices=("json", "csv", "xmp"), default="json", help="(%(default)s)")
    parser.add_argument(
        "--json", dest="format", action="store_const", const="json", help="same as --format json"
    )
    parser.add_argument("--out", type=Path, help="file for the results; a later run adds what is new")
    parser.add_argument(
        "--journal",
        type=Path,
        help="where finished photos are noted, so that a later run goes on (OUT.journal; --format xmp has none "
        "unless you name one, and goes through all photos again)",
    )
    parser.add_argument("--top", type=_positive, metavar="N", help="at most N labels a photo")
    parser.add_argument(
        "--min-probability", type=_probability, metavar="P", help="one threshold instead of the tagger's own"
    )
    parser.add_argument(
        "--explain",
        type=Path,
        metavar="DIR",
        help="write a heat map (PNG) per label found, also for photos that are in OUT already; what is in DIR is "
        "not tagged",
    )
    parser.add_argument(
        "--sidecar",
        choices=NAMINGS,
        default=NAMINGS[0],
        help="name of new sidecars; one that exists is written, whatever its name. digiKam, darktable and Immich use "
        "the first; the second is what Adobe's programs give the raw file of that name, refused where two photos would "
        "share it (%(default)s)",
    )
    parser.add_argument(
        "--exclude",
        action="append",
        default=[],
        metavar="PATTERN",
        help="leave out files and folders of this name below the folders given; * and ? as in a shell, may be given "
        "again. Thumbnails and waste baskets of NAS systems and the insides of photo libraries are left out anyway",
    )
    parser.add_argument("--watch", action="store_true", help="keep running and tag photos as they appear")
    parser.add_argument("--serve", action="store_true", help="serve a web page on this machine instead")
    parser.add_argument(
        "--port", type=int, default=8765, help="port of --serve; 0 takes a free one (%(default)s)"
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="address of --serve (%(default)s: this machine alone)"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "tensorrt"), default="auto")
    parser.add_argument("--threads", type=_positive, help="cores to use (all)")
    parser.set_defaults(usage_error=parser.error)


def run(arguments: argparse.Namespace) -> int:
    """Tag what was asked for; 1 if any photo failed."""
    if bool(arguments.photos) == arguments.serve:
        arguments.usage_error("give photos to tag, or --serve")
    if arguments.journal and arguments.format != "xmp" and not arguments.out:
        arguments.usage_error("--journal needs --out: results on standard output cannot be continued")
    if arguments.out and arguments.format == "xmp":
        arguments.usage_error("--format xmp writes sidecars beside the photos; --out is for json and csv")
    _check_sources(arguments)
    alone = len(arguments.photos) == 1 and os.path.isfile(arguments.photos[0])  # noqa: PTH113  # Path's may raise
    many = not (
        arguments.serve or arguments.watch or alone
    )  # those have one photo at a time, which all cores share
    tagger = Tagger.load(arguments.tagger, arguments.device, arguments.threads, many=many)
    if arguments.serve:
        return _serve(tagger, arguments.host, arguments.port)
    if arguments.explain and not tagger.has_heatmaps:
        raise TagError(
            f"--explain: {arguments.tagger} was exported without heat maps; export it again with them"
        )
    skipped: Counter[str] = Counter()
    failed: list[FedmptError] = []
    with contextlib.ExitStack() as stack:
        results = _open_results(arguments, stack)
        count = 0
        for photos, stop in _photo_lists(arguments, skipped, stack):
            count += _tag(arguments, tagger, results, photos, failed, stop)
    _report(count, failed, skipped)
    return 1 if failed else 0


def _check_sources(arguments: argparse.Namespace) -> None:
    """Refuse what would be watched or drawn for ever."""
    if arguments.watch and "-" in arguments.photos:
        arguments.usage_error("--watch takes files, folders and patterns, no names on standard input")
    for source in arguments.photos:
        if arguments.watch and not Path(source).exists() and not glob.has_magic(source):
            raise TagError(f"{source}: there is nothing to watch; check the path")
        if arguments.explain and not Path(source).is_file() and _is_within(Path(source), arguments.explain):
            raise TagError(
                f"--explain {arguments.explain}: holds {source}, so that the heat maps would be tagged next; give a "
                "folder of its own"
            )


def _is_within(path: Path, folder: Path) -> bool:
    # Unlike Path.resolve it also takes loops of links.
    found, within = (Path(os.path.realpath(each)) for each in (path, folder))
    return found == within or within in found.parents


class _Results:
    """Where tags and heat maps go, and the journals of what is done."""

    def __init__(
        self,
        arguments: argparse.Namespace,
        stream: IO[bytes] | None,
        journal: Journal | None,
        drawings: Journal | None,
    ) -> None:
        self._arguments = arguments
        self._stream = stream
        self._journal = journal
        self._drawings = drawings
        self._to_write: set[Path] = set()
        self._to_draw: set[Path] = set()

    def select(self, photos: Sequence[Path]) -> list[Path]:
        """What is not done yet."""
        self._to_write = set(self._journal.select(photos) if self._journal else photos)
        if self._arguments.explain:
            self._to_draw = set(self._drawings.select(photos) if self._drawings else photos)
        return [path for path in photos if path in self._to_write or path in self._to_draw]

    def write(self, result: Tagged) -> None:
        """Write what one photo lacks and note it as done.

        Raises:
            PhotoError: its heat maps cannot be drawn; its tags are written.
            XmpError: as :func:`fedmpt.edge_client.sidecars.write_sidecar`.
        """
        if result.path in self._to_write:
            self._write_tags(result)
        if result.path in self._to_draw:
            try:
                write_explanations(self._arguments.explain, result, EXPLANATION_SIZE)
            except OSError as error:
                raise PhotoError(result.path, f"no heat maps: {error.strerror or error}") from error
            if self._drawings:
                self._drawings.record(result.path)

    def _write_tags(self, result: Tagged) -> None:
        if self._stream is None:
            write_sidecar(result.path, [label for label, _ in result.tags], self._arguments.sidecar)
        else:
            render = tag_results.csv_rows if self._arguments.format == "csv" else tag_results.json_line
            self._stream.write(render(result))
            self._stream.flush()
        if self._journal:
            self._journal.record(result.path, self._stream.tell() if self._stream else 0)


def _open_results(arguments: argparse.Namespace, stack: contextlib.ExitStack) -> _Results:
    out: Path | None = arguments.out
    path: Path | None = arguments.journal
    if out:
        path = path or out.with_name(f"{out.name}.journal")
        if out.exists() and not path.exists():
            raise TagError(f"{out}: exists, and {path} does not; remove it or choose another --out")
    journal = drawings = None
    if arguments.explain:
        arguments.explain.mkdir(parents=True, exist_ok=True)
    if path:
        common = {
            "tagger": sha256_file(arguments.tagger),
            **{name: str(getattr(arguments, name)) for name in ("top", "min_probability")},
        }
        others = {name: str(getattr(arguments, name)) for name in ("format", "sidecar", "out")}
        journal = Journal(path, common | others, out)
        stack.callback(journal.close)
        if arguments.explain:
            drawings = Journal(arguments.explain / DRAWINGS_JOURNAL, common)
            stack.callback(drawings.close)
    if arguments.format == "xmp":
        return _Results(arguments, None, journal, drawings)
    stream: IO[bytes] = sys.stdout.buffer
    begun = 0
    if out and journal:
        stream = stack.enter_context(out.open("r+b" if out.exists() else "wb"))
        begun = stream.seek(stream.truncate(journal.offset))
    if arguments.format == "csv" and not begun:
        stream.write(tag_results.CSV_HEADER)
    return _Results(arguments, stream, journal, drawings)


def _photo_lists(
    arguments: argparse.Namespace, skipped: Counter[str], stack: contextlib.ExitStack
) -> Iterator[tuple[list[Path], threading.Event]]:
    """The photos to tag, in one list, or in many as they appear; and the event that asks to stop."""
    stop = threading.Event()
    names = [name for source in arguments.photos for name in (_stdin_names() if source == "-" else [source])]
    if arguments.format == "xmp":
        named = names
        names = [name for name in named if not _is_in_service_folder(name, skipped)]
        if named and not names:
            raise TagError(
                f"{named[0]}: a service folder or the inside of a photo library, where no sidecars are written; "
                "--format json tags it"
            )
    wanted = functools.partial(_is_wanted, named=set(map(Path, names)), explain=arguments.explain)
    if not arguments.watch:
        yield list(filter(wanted, find_photos(names, skipped, arguments.exclude))), stop
        return
    for number in (signal.SIGINT, signal.SIGTERM):
        stack.callback(signal.signal, number, signal.signal(number, lambda *_: stop.set()))
    print(f"watching {', '.join(names)}; Ctrl-C ends", file=sys.stderr)
    for photos in watch(names, WATCH_SECONDS, stop, arguments.exclude):
        yield list(filter(wanted, photos)), stop


def _is_in_service_folder(name: str, skipped: Counter[str]) -> bool:
    """Where nothing is written, although it was named: a shell's pattern names such folders, too."""
    found = [part for part in Path(os.path.abspath(name)).parts if is_service_folder(part)]  # noqa: PTH100  # no links
    skipped.update(found[:1])
    return bool(found)


def _is_wanted(path: Path, named: set[Path], explain: Path | None) -> bool:
    """Not for a heat map that was come across in a folder: its own heat maps would be next."""
    return explain is None or path in named or not _is_within(path, explain)


def _tag(
    arguments: argparse.Namespace,
    tagger: Tagger,
    results: _Results,
    photos: list[Path],
    failed: list[FedmptError],
    stop: threading.Event,
) -> int:
    pending = results.select(photos)
    tagged = tag_photos(
        tagger,
        pending,
        top=arguments.top,
        min_probability=arguments.min_probability,
        explain=arguments.explain is not None,
        workers=arguments.threads,
    )
    done = 0
    with progress_bar("tagging") as progress, contextlib.closing(tagged):
        for done, result in enumerate(tagged, 1):
            progress(done, len(pending))
            try:
                if isinstance(result, PhotoError):
                    raise result
                results.write(result)
            except (PhotoError, XmpError) as error:
                failed.append(error)
                if arguments.watch:
                    print(f"failed: {error}", file=sys.stderr)
            if stop.is_set():
                break
    return done


def _serve(tagger: Tagger, host: str, port: int) -> int:
    from fedmpt.edge_client.serve import LOOPBACK, open_server

    with open_server(tagger, host, port) as server:
        if host not in LOOPBACK:
            print(
                f"warning: everyone who can reach {host} can use this page; it has no password",
                file=sys.stderr,
            )
        print(f"http://{host}:{server.server_port}/  (Ctrl-C ends)", flush=True)
        # From a thread of its own: shutdown() waits for the loop, so the loop cannot be what it interrupts.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: threading.Thread(target=server.shutdown).start())
        server.serve_forever()
    return 0


def _report(count: int, failed: list[FedmptError], skipped: Counter[str]) -> None:
    """Tell on stderr how the run went; results are on stdout."""
    for error in failed:
        print(f"failed: {error}", file=sys.stderr)
    summary = f"{count - len(failed)} photos tagged, {len(failed)} failed"
    if skipped:
        kinds = ", ".join(
            f"{number} {suffix or 'without suffix'}" for suffix, number in skipped.most_common(6)
        )
        summary += f"; passed over: {kinds}"
    print(summary, file=sys.stderr)


def _stdin_names() -> list[str]:
    data = sys.stdin.buffer.read()
    names = data.split(b"\0") if b"\0" in data else data.splitlines()
    return [os.fsdecode(name) for name in names if name]


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def _probability(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError("must be between 0 and 1")
    return value
