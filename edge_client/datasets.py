"""Readers of labelled photos: a folder with ``labels.csv``, COCO instances JSON, PASCAL VOC XML.

They read annotations only and open no photo; a photo that is missing or broken is found when it is decoded.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import unicodedata
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

from fedmpt.edge_client.labels import UNKNOWN, LabelRules, Labels, encode_labels, resolve_names
from fedmpt.protocol.errors import FedmptError

LABELS_FILE = "labels.csv"
MAXIMUM_TEXT_BYTES = 256 << 20
MAXIMUM_COCO_BYTES = 1 << 30
MAXIMUM_XML_BYTES = 4 << 20
_SECOND_COLUMN = re.compile(r"\s+(-1|0|1)$")


class DatasetError(FedmptError):
    """An annotation file is missing, malformed or contradicts itself."""


@dataclass(frozen=True, eq=False)
class LabelledPhoto:
    """A photo file and its labels, int8 ``[C]``: 1 present, 0 absent, −1 unknown."""

    path: Path
    labels: Labels


@dataclass(frozen=True)
class _Annotation:
    where: str  # it was read
    name: str  # relative to the photos' folder, with forward slashes
    present: Collection[str]
    unknown: Collection[str] = ()


def read_folder(
    folder: Path, rules: LabelRules, *, selection: Collection[str] | None = None
) -> list[LabelledPhoto]:
    """Read ``labels.csv`` of a folder: header ``path,labels`` or ``path,labels,unknown``.

    ``path`` is relative to the folder; ``labels`` and ``unknown`` hold names joined by semicolons; a label
    that is named in neither is absent. ``selection`` keeps the photos named in it, see :func:`read_selection`.

    Raises:
        DatasetError: the file is missing, too large, not UTF-8 or malformed; the text names the line.
        LabelError: it uses names that are not labels.
    """
    file = folder / LABELS_FILE
    if not os.path.lexists(file):
        raise DatasetError(
            f"{file}: no such file; write one (its first line: path,labels), or give --coco JSON, "
            "or a PASCAL VOC folder (Annotations, JPEGImages)"
        )
    rows = csv.reader(io.StringIO(_read_text(file), newline=""), strict=True)
    annotations: dict[str, _Annotation] = {}
    try:
        header = [cell.strip() for cell in next(rows, [])]
        if header not in (["path", "labels"], ["path", "labels", "unknown"]):
            raise DatasetError(f"{file}: line 1 must be `path,labels` or `path,labels,unknown`, not {header}")
        for row in rows:
            if not row:
                continue
            where = f"{file}: line {rows.line_num}"
            if len(row) != len(header):
                raise DatasetError(f"{where}: expected {len(header)} columns, got {len(row)}")
            name = _relative(row[0], where)
            if name in annotations:
                raise DatasetError(f"{where}: {name!r} is listed twice; keep one line for each photo")
            annotations[name] = _Annotation(where, name, *(_names(cell) for cell in row[1:]))
    except csv.Error as error:
        raise DatasetError(f"{file}: line {rows.line_num}: {error}") from None
    if not annotations:
        raise DatasetError(f"{file}: names no photo; write a line for each")
    return _label(annotations.values(), folder, rules, selection)


def read_coco(
    annotations: Path, folder: Path, rules: LabelRules, *, selection: Collection[str] | None = None
) -> list[LabelledPhoto]:
    """Read a COCO instances JSON; its ``file_name`` entries are relative to ``folder``.

    A label is present where a photo has an object of it and absent where not; a label of the federation that
    the file's category list does not have is unknown in every photo, for nobody looked for it.

    Raises:
        DatasetError: the file is missing, too large, not JSON, names no photo or contradicts itself, or an entry
            is malformed.
        LabelError: its categories are not labels.
    """
    content = _read_json(annotations)
    names: dict[int, str] = {}
    for i, item in enumerate(_field(content, "categories", list, str(annotations))):
        where = f"{annotations}: categories[{i}]"
        number, name = _field(item, "id", int, where), _field(item, "name", str, where)
        if names.setdefault(number, name) != name:
            raise DatasetError(
                f"{where}: id {number} means {names[number]!r} and {name!r}; give each category an id of its own"
            )
    present: dict[int, set[str]] = {}
    files: dict[int, str] = {}
    numbers: dict[str, int] = {}
    for i, item in enumerate(_field(content, "images", list, str(annotations))):
        where = f"{annotations}: images[{i}]"
        number = _field(item, "id", int, where)
        name = _relative(_field(item, "file_name", str, where), where)
        if files.setdefault(number, name) != name:
            raise DatasetError(
                f"{where}: id {number} means {files[number]!r} and {name!r}; give each image an id of its own"
            )
        if numbers.setdefault(name, number) != number:
            raise DatasetError(
                f"{where}: {name!r} has the ids {numbers[name]} and {number}; keep one, for all its annotations"
            )
        present[number] = set()
    if not files:
        raise DatasetError(f"{annotations}: names no photo; is this the right file?")
    for i, item in enumerate(_field(content, "annotations", list, str(annotations))):
        where = f"{annotations}: annotations[{i}]"
        image, category = _field(item, "image_id", int, where), _field(item, "category_id", int, where)
        if image not in present or category not in names:
            raise DatasetError(f"{where}: image {image} or category {category} is not in the file")
        present[image].add(names[category])
    found = [_Annotation(str(annotations), files[number], labels) for number, labels in present.items()]
    return _label(found, folder, rules, selection, annotated=names.values())


def read_voc(
    folder: Path,
    rules: LabelRules,
    *,
    selection: Collection[str] | None = None,
    difficult_unknown: bool = False,
) -> list[LabelledPhoto]:
    """Read a PASCAL VOC folder: ``Annotations/*.xml`` for the photos in ``JPEGImages/``.

    ``difficult_unknown`` makes a label unknown where all its objects are marked difficult.

    Raises:
        DatasetError: no annotations, or one that is too large, not XML, not VOC's or malformed, or two of one photo.
        LabelError: objects' names are not labels.
    """
    # macOS leaves a "._x.xml" beside each x.xml on foreign disks.
    files = sorted(file for file in (folder / "Annotations").glob("*.xml") if not file.name.startswith("._"))
    if not files:
        raise DatasetError(
            f"{folder}: no Annotations/*.xml; give the folder that holds Annotations and JPEGImages"
        )
    found: dict[str, _Annotation] = {}
    for file in files:
        root = _read_xml(file)
        if root.tag != "annotation":
            raise DatasetError(
                f"{file}: begins with <{root.tag}>, not <annotation>; is this a VOC annotation?"
            )
        present: set[str] = set()
        difficult: set[str] = set()
        for item in root.iter("object"):
            name = (item.findtext("name") or "").strip()
            if not name:
                raise DatasetError(f"{file}: an object has no name")
            hard = difficult_unknown and (item.findtext("difficult") or "0").strip() == "1"
            (difficult if hard else present).add(name)
        photo = _relative((root.findtext("filename") or "").strip() or f"{file.stem}.jpg", str(file))
        if photo in found:
            raise DatasetError(f"{file}: is of {photo!r}, as is {found[photo].where}; keep one of them")
        found[photo] = _Annotation(str(file), photo, present, difficult - present)
    return _label(found.values(), folder / "JPEGImages", rules, selection)


def read_selection(path: Path) -> frozenset[str]:
    """Read a list of photos, one a line, as in VOC's ``ImageSets/Main/train.txt``.

    A photo may be named by its relative path, its file name, or its file name without the suffix. The second
    column of VOC's lists for one class (``000024  1``; 1, 0 or -1) says nothing here: each listed photo counts.

    Raises:
        DatasetError: the file is missing, too large, not UTF-8 or empty.
    """
    names = frozenset(line.strip() for line in _read_text(path).splitlines() if line.strip())
    if not names:
        raise DatasetError(f"{path}: names no photo; write one name a line")
    return names


def _label(
    annotations: Iterable[_Annotation],
    folder: Path,
    rules: LabelRules,
    selection: Collection[str] | None,
    annotated: Collection[str] | None = None,
) -> list[LabelledPhoto]:
    """Turn names into labels; ``annotated``: the only names that the annotators looked for, if stated."""
    found = list(annotations)
    used = {name: item.where for item in reversed(found) for name in (*item.present, *item.unknown)}
    resolved = resolve_names(used | dict.fromkeys(annotated or (), found[0].where), rules)
    if selection is not None:
        found = _select(found, selection)
    photos = []
    for item in found:
        labels = encode_labels(item.present, item.unknown, resolved, rules)
        if annotated is not None and not rules.unknown_as_negative:
            unseen = set(range(len(labels))) - set(resolved.values())
            labels[list(unseen)] = UNKNOWN
        photos.append(LabelledPhoto(_existing(folder, item.name), labels))
    return photos


def _select(annotations: list[_Annotation], selection: Collection[str]) -> list[_Annotation]:
    ways = {}
    for item in annotations:
        path = PurePosixPath(item.name)
        ways[item.name] = {item.name, path.name, path.stem}
    known = set().union(*ways.values())
    named = {name if name in known else _SECOND_COLUMN.sub("", name) for name in selection}
    missing = named - known
    if missing:
        shown = ", ".join(sorted(missing)[:5])
        raise DatasetError(
            f"the split names {len(missing)} photos that the annotations do not have ({shown}, …); "
            "give the split that belongs to these annotations"
        )
    return [item for item in annotations if ways[item.name] & named]


def _existing(folder: Path, name: str) -> Path:
    """The photo's path; macOS stores decomposed file names, so try the other Unicode forms as well."""
    path = folder / name
    if name.isascii():
        return path
    forms = (folder / unicodedata.normalize(form, name) for form in ("NFC", "NFD"))
    return next((other for other in (path, *forms) if other.is_file()), path)


def _names(cell: str) -> list[str]:
    return [name.strip() for name in cell.split(";") if name.strip()]


def _relative(name: str, where: str) -> str:
    path = PurePosixPath(name.replace("\\", "/"))
    if (
        not name.strip()
        or not path.parts  # "." names the folder itself
        or path.is_absolute()
        or ".." in path.parts
        or "\0" in name
        or path.parts[0][1:2] == ":"
    ):
        raise DatasetError(f"{where}: {name!r} is no path inside the photos' folder")
    return str(path)


def _field(value: Any, key: str, kind: type, where: str) -> Any:
    if not isinstance(value, dict) or type(value.get(key)) is not kind:
        raise DatasetError(f"{where}: no {key!r} of type {kind.__name__}; is this a COCO instances file?")
    return value[key]


def _read_json(path: Path) -> Any:
    try:
        return json.loads(_read_bytes(path, MAXIMUM_COCO_BYTES))
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{path}: not JSON ({error})") from None


def _read_xml(path: Path) -> Element:
    # VOC files have no document type; without one there are no entities to expand or to fetch.
    def refuse(*_: object) -> None:
        raise DatasetError(
            f"{path}: has a document type declaration, which is refused; remove the <!DOCTYPE …>"
        )

    builder = TreeBuilder()
    parser = expat.ParserCreate()
    parser.StartDoctypeDeclHandler = refuse
    parser.StartElementHandler = builder.start
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.data
    try:
        parser.Parse(_read_bytes(path, MAXIMUM_XML_BYTES), True)
        return builder.close()
    except (expat.ExpatError, ValueError, LookupError) as error:
        raise DatasetError(f"{path}: not XML ({error})") from None


def _read_text(path: Path) -> str:
    try:
        return _read_bytes(path, MAXIMUM_TEXT_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path}: not UTF-8 ({error}); save it as UTF-8") from None


def _read_bytes(path: Path, limit: int) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except FileNotFoundError:
        raise DatasetError(f"{path}: no such file") from None
    except OSError as error:
        raise DatasetError(f"{path}: {error.strerror}") from None
    if len(data) > limit:
        raise DatasetError(f"{path}: larger than {limit} bytes, the limit for annotations")
    return data
