"""The figures in docs/micro-clip.md and the model card are those of docs/results/micro-clip.json."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

from fedmpt.simulation.micro_clip_evaluation import WEIGHTS

ROOT = Path(__file__).resolve().parents[2]
REPORT = json.loads((ROOT / "docs" / "results" / "micro-clip.json").read_text())
POOLINGS = ("class_token", "best_patch")


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |\n"


def quality_table() -> str:
    sets, pointing = REPORT["in_style_zero_shot_map"], REPORT["pointing"]
    whole, patch = (", ".join(f"{one[pooling]:.3f}" for one in sets) for pooling in POOLINGS)
    zero_shot = "zero-shot mAP, 50 labels, common styles, class token, three sets of 1,000 pictures"
    points = "pointing: the best patch's centre lies in a box of the label"
    return (
        "| figure | aim | measured |\n|---|---|---|\n"
        + row(zero_shot, "0.90", whole)
        + row("… best patch", "0.90", patch)
        + row(
            f"{points} (chance {pointing['chance_centre_in_box']:.2f})",
            "0.80",
            f"{pointing['centre_in_box']:.3f}",
        )
        + row("the right background ranks first of ten", "0.80", f"{REPORT['background_first']:.3f}")
    )


def over_federations(*path: str) -> list[float]:
    """For class token and best patch, the mean of what stands at `path` (POOLING stands for theirs)."""

    def value(federation: dict[str, Any], pooling: str) -> float:
        found: Any = federation
        for key in path:
            found = found[pooling if key == "POOLING" else key]
        return float(found)

    return [mean(value(one, pooling) for one in REPORT["federation_map"]) for pooling in POOLINGS]


def gap_table() -> str:
    start = over_federations("zero_shot", "POOLING")

    def plain(name: str, *path: str) -> str:
        whole, patch = over_federations(*path)
        return row(name, f"{whole:.3f}", f"{patch:.3f}")

    def tuned(name: str, method: str) -> str:
        whole, patch = over_federations(method, "POOLING")
        gains = [100 * (value - before) for value, before in zip((whole, patch), start, strict=True)]
        return row(name, f"{whole:.3f} (+{gains[0]:.1f} points)", f"{patch:.3f} (+{gains[1]:.1f})")

    words, strange, searched = "untrained_wordings", "untrained_strange_wordings", "searched_tokens"
    return (
        "| method | class token | best patch |\n|---|---|---|\n"
        + plain('zero-shot, "a photo of a {label}."', "zero_shot", "POOLING")
        + plain(
            "the best of fourteen plain wordings, chosen on these very pictures", words, "POOLING", "best"
        )
        + plain("the mean of the fourteen wordings' text features", words, "POOLING", "mean_of_features")
        + plain(
            "the mean of a photo's, a flat and a sketch picture's wording",
            "untrained_style_wordings",
            "POOLING",
            "mean_of_features",
        )
        + plain("the median of sixty strange sentences", strange, "POOLING", "median")
        + plain("the best of the sixty, chosen on these very pictures", strange, "POOLING", "best")
        + plain(
            "a search over the vocabulary that sees the labels: best of 400 random token sequences",
            searched,
            "POOLING",
            "random",
        )
        + plain("… and after 1,600 changes of single tokens", searched, "POOLING", "climbed")
        + tuned("CoOp, four context vectors, trained centrally", "coop")
        + tuned("adapter of rank 32, trained centrally", "adapter")
    )


@pytest.mark.parametrize(
    "page", [ROOT / "docs" / "micro-clip.md", WEIGHTS / "README.md"], ids=["docs", "card"]
)
def test_the_tables_are_those_of_the_evaluation(page: Path) -> None:
    text = page.read_text()
    assert quality_table() in text
    assert gap_table() in text


def test_the_evaluation_is_of_the_shipped_weights() -> None:
    weights = (WEIGHTS / "model.safetensors").read_bytes()
    assert REPORT["model_sha256"] == hashlib.sha256(weights).hexdigest()
