"""The Markdown page that travels beside a ``tagger.onnx``."""

from __future__ import annotations

from fedmpt.protocol.tagger_info import Measurement, TaggerInfo


def card_title(file_name: str) -> str:
    """The first line of a file's card."""
    return f"# {file_name}"


def model_card(info: TaggerInfo, file_name: str, *, heatmaps: bool) -> str:
    """What the file is, takes and gives, where it came from, and what was measured of it."""
    rows, columns = info.grid
    said = (("method", info.method), ("bundle", info.bundle_digest))
    provenance = [f"- {name}: {value}" for name, value in sorted(info.provenance.items() - set(said))]
    maps = (
        f"- `heatmaps`: float32 `[batch, {len(info.labels)}, {rows}, {columns}]`, where in the photo each label's "
        "score came from; each map sums to 1."
    )
    return "\n".join(
        [
            card_title(file_name),
            "",
            f"Recognises {len(info.labels)} labels in photos, several per photo. One self-contained ONNX file; "
            "it needs neither a network nor PyTorch.",
            "",
            "## Input and outputs",
            "",
            f"- `pixels`: uint8 `[batch, {info.image_size}, {info.image_size}, 3]`, RGB. "
            f"Preprocessing: {info.preprocessing}.",
            f"- `probabilities`: float32 `[batch, {len(info.labels)}]`.",
            *([maps] if heatmaps else []),
            f"- Precision of the weights and of most arithmetic: {info.precision}.",
            "",
            "## Provenance",
            "",
            f"- Method: {info.method}",
            f"- CLIP checkpoint: {info.clip}",
            f"- Licence of the CLIP weights: {info.licence}",
            f"- State: sha256 {info.state_digest}",
            f"- Bundle: sha256 {info.bundle_digest}",
            *provenance,
            "",
            "## Measured",
            "",
            *_measured(info.measurement, info.temperature),
            "",
            "## Labels",
            "",
            "A photo has a label if its probability reaches the threshold.",
            "",
            "| label | threshold |",
            "|---|---|",
            *(
                f"| {label.replace('|', chr(92) + '|')} | {threshold:.3f} |"
                for label, threshold in zip(info.labels, info.thresholds, strict=True)
            ),
            "",
        ]
    )


def _measured(measurement: Measurement, temperature: float) -> list[str]:
    if not measurement.photos:
        return [
            "Nothing was measured at export: thresholds are 0.5 and probabilities are as the federation left them. "
            "Give `fedmpt export` a validation cache to calibrate them."
        ]
    lines = [
        f"Thresholds and temperature were chosen on {measurement.photos} photos of {measurement.source}, and the "
        "figures are of the same photos. For figures of a test set measure photos that are not among them; this "
        "file cannot know which those are.",
        "",
    ]
    if measurement.rule:
        lines.append(f"- Thresholds: {measurement.rule}")
    if measurement.map is not None:
        lines.append(f"- Mean average precision: {100 * measurement.map:.1f} %")
    before, after = measurement.calibration_error_before, measurement.calibration_error_after
    if before is not None and after is not None:
        lines.append(
            f"- Expected calibration error: {before:.4f} before, {after:.4f} after temperature {temperature:.3f}"
        )
    if measurement.cost is not None:
        lines.append(
            f"- Cost of the precision: {round(100 * measurement.cost, 2) + 0.0:.2f} points of mean average precision "
            f"({measurement.reference})"
        )
    return lines
