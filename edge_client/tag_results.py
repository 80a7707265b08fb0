"""Where tags go: JSON lines, CSV rows, XMP sidecars, and heat maps laid over the photos."""

from __future__ import annotations

import csv
import io
import json

from fedmpt.edge_client.tagging import Tagged

CSV_HEADER = b"path,label,probability\n"


def json_line(result: Tagged) -> bytes:
    """``{"path": …, "tags": [{"label": …, "probability": …}]}`` and a line break."""
    tags = [{"label": label, "probability": round(probability, 6)} for label, probability in result.tags]
    text = json.dumps({"path": str(result.path), "tags": tags}, ensure_ascii=False)
    # A name may be any bytes; those that are no UTF-8 become JSON escapes, from which os.fsencode makes them again.
    return text.encode("utf-8", "backslashreplace") + b"\n"


def csv_rows(result: Tagged) -> bytes:
    """One row ``path,label,probability`` a label; one with empty cells for a photo without labels."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    rows = [(label, f"{probability:.6f}") for label, probability in result.tags]
    writer.writerows((result.path, *row) for row in rows or [("", "")])
    return text.getvalue().encode("utf-8", "surrogateescape")
