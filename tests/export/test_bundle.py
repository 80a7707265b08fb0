"""A bundle is complete, described, verified and repeatable."""

from __future__ import annotations

from pathlib import Path

from fedmpt.protocol.manifest import load_manifest, verify_bundle


def test_a_bundle_holds_the_four_graphs_and_matches_its_manifest(tiny_bundle: Path) -> None:
    manifest = load_manifest(tiny_bundle)
    verify_bundle(tiny_bundle, manifest)
    assert set(manifest.graphs) == {"image_encoder", "train_step", "text_features", "head"}
