"""The model card says what is known of the file, and nothing else."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from fedmpt.export.model_card import model_card
from fedmpt.export.tagger import export_tagger
from fedmpt.protocol.codec import load_state
from fedmpt.protocol.manifest import load_manifest
from fedmpt.protocol.tagger_info import Measurement, TaggerInfo, info_from_json, info_to_json


@pytest.fixture
def info(tiny_bundle: Path, tmp_path: Path) -> TaggerInfo:
    state = load_state(tiny_bundle / "state.safetensors", load_manifest(tiny_bundle).state)
    return export_tagger(tiny_bundle, state, tmp_path / "t.onnx")


def test_heat_maps_are_named_only_where_the_file_has_them(tiny_bundle: Path, tmp_path: Path) -> None:
    state = load_state(tiny_bundle / "state.safetensors", load_manifest(tiny_bundle).state)
    for heatmaps in (True, False):
        export_tagger(tiny_bundle, state, tmp_path / "t.onnx", heatmaps=heatmaps)
        assert ("heatmaps" in (tmp_path / "model-card.md").read_text()) == heatmaps


@pytest.mark.parametrize(("cost", "shown"), [(-1e-7, "0.00"), (-0.0012, "-0.12"), (0.0044, "0.44")])
def test_a_cost_that_is_none_has_no_sign(info: TaggerInfo, cost: float, shown: str) -> None:
    measurement = Measurement(9, "north", cost=cost, reference="50.12 in float32 on 9 photos")
    card = model_card(dataclasses.replace(info, measurement=measurement), "t.onnx", heatmaps=True)
    assert f"- Cost of the precision: {shown} points of mean average precision (50.12 in float32" in card


def test_a_description_without_the_rule_of_its_thresholds_is_still_read(info: TaggerInfo) -> None:
    older = info_to_json(info).replace(',"rule":""', "")
    assert "rule" not in older
    assert info_from_json(older, "t.onnx") == info
