"""Measure what the method leaves open, on scenes with the shipped micro-CLIP; write docs/results/method.json.

``python benchmarks/method_choices.py untrained`` compares image tokens, poolings, τ and λ before any training;
``trained`` runs small federations (four clients, planted pairs at 0.9, ten rounds) with the product's trainer.
Test figures are of photos with independent labels; none is used to choose a threshold.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedmpt.edge_client.engine import HeadOutput
from fedmpt.edge_client.metrics import mean_average_precision, recall_thresholds, spurious_activation_rate
from fedmpt.edge_client.trainer import SiteData, calibrate, train_round
from fedmpt.export import methods, programs
from fedmpt.export.clip import TOKEN_KINDS, ClipCheckpoint, load_clip
from fedmpt.export.conditions import DEFAULT_CONDITIONS
from fedmpt.export.frozen import freeze
from fedmpt.export.methods import METHODS, Setup
from fedmpt.export.presets import PAPER_TRAINING
from fedmpt.protocol.codec import State
from fedmpt.protocol.manifest import Pooling, TensorSpec, Training
from fedmpt.simulation.scenes import SceneSet
from fedmpt.simulation.scenes_sets import FEDERATION_LABELS, FederationSet, federation_set

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "docs" / "results" / "method.json"
RECALL = 0.7  # thresholds for the spurious activation rate


@dataclasses.dataclass(frozen=True)
class Bench:
    """One federation's photos and the tokens made of them, by (kind, mode)."""

    clip: ClipCheckpoint
    scenes: FederationSet
    store: Path
    seed: int

    def tokens(self, name: str, scenes: SceneSet, kind: str, mode: str) -> Tensor:
        """Float16-rounded tokens, as a feature cache holds them."""
        path = self.store / f"{self.seed}-{name}-{kind}-{mode}.npy"
        if not path.exists():
            parts = [
                programs.run_image_encoder(self.clip, self.clip.vision, torch.from_numpy(block), kind, mode)
                for block in np.array_split(scenes.pixels, -(-len(scenes) // 32))
            ]
            np.save(path, torch.cat(parts).half().numpy())
        return torch.from_numpy(np.load(path)).float()


class Engine:
    """The bundle's programs in PyTorch, as the trainer wants them."""

    def __init__(self, setup: Setup, training: Training, weights: dict[str, Tensor]) -> None:
        self.setup, self.training, self.weights = setup, training, weights

    def train_step(
        self, state: State, tokens: NDArray[np.floating], labels: NDArray[np.int8]
    ) -> tuple[float, State]:
        found = programs.run_train_step(
            self.setup,
            self.training,
            self.weights,
            tensors(state),
            torch.from_numpy(tokens).float(),
            torch.from_numpy(labels),
        )
        loss = float(found.pop("loss"))
        return loss, {name.removeprefix("gradient."): value.numpy() for name, value in found.items()}

    @torch.no_grad()
    def text_features(self, state: State) -> NDArray[np.float32]:
        return methods.text_features(self.setup, self.weights, tensors(state)).numpy()

    @torch.no_grad()
    def head(self, state: State, text: NDArray[np.float32], tokens: NDArray[np.floating]) -> HeadOutput:
        found = programs.run_head(
            self.setup, tensors(state), torch.from_numpy(tokens).float(), torch.from_numpy(text)
        )
        return HeadOutput(**{name: value.numpy() for name, value in found.items()})


def tensors(state: State) -> dict[str, Tensor]:
    return {name: torch.from_numpy(np.asarray(value, dtype=np.float32)) for name, value in state.items()}


def setup_of(
    clip: ClipCheckpoint, method: str, pooling: Pooling, context: int = 4
) -> tuple[Setup, dict[str, Tensor]]:
    return freeze(
        clip,
        FEDERATION_LABELS,
        DEFAULT_CONDITIONS if METHODS[method].conditioned else (),
        method,
        pooling,
        condition_context=context,
        class_context=context,
        adapter_rank=32,
    )


@torch.no_grad()
def untrained(bench: Bench) -> list[dict[str, Any]]:
    """mAP and pointing of "a photo of a {label}." for every kind of token and pooling."""
    rows = []
    scenes = bench.scenes.decorrelated
    setup, weights = setup_of(bench.clip, "zero-shot", Pooling("max", 1.0, 0.1, 10))
    text = methods.text_features(setup, weights, {})
    for kind in TOKEN_KINDS:
        for mode in ("full", "pooled"):
            tokens = bench.tokens("decorrelated", scenes, kind, mode)
            cosine = tokens @ text[0].T
            rows.append(row(bench, kind, mode, "class token", None, None, cosine[:, 0], None, scenes))
            for pooling in poolings():
                psi, plan = methods._pool(
                    dataclasses.replace(setup, pooling=pooling), tokens[:, 1:], text, pooling.name, {}, True
                )
                rows.append(
                    row(
                        bench,
                        kind,
                        mode,
                        pooling.name,
                        pooling.tau,
                        pooling.reg,
                        psi[:, 0],
                        plan[:, 0],
                        scenes,
                    )
                )
    return rows


def poolings() -> list[Pooling]:
    found = [Pooling("max", 1.0, 0.1, 10)]
    taus = (0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0)
    found += [Pooling("softmax", tau, 0.1, 10) for tau in taus]
    found += [Pooling("transport", tau, reg, 10) for tau in taus for reg in (0.01, 0.02, 0.05, 0.1, 0.2)]
    return found


def row(
    bench: Bench,
    kind: str,
    mode: str,
    pooling: str,
    tau: float | None,
    reg: float | None,
    scores: Tensor,
    plan: Tensor | None,
    scenes: SceneSet,
) -> dict[str, Any]:
    result = {"seed": bench.seed, "tokens": kind, "mode": mode, "pooling": pooling, "tau": tau, "reg": reg}
    result["mAP"] = mean_average_precision(scores.numpy(), scenes.truth)
    if plan is not None:
        result["pointing"] = pointing(plan, scenes)
    return result


def pointing(plan: Tensor, scenes: SceneSet) -> float:
    """How often the heaviest patch of a shown label's plan [B, M, C] touches a box of that label."""
    best = plan.argmax(1).numpy()
    side = round(plan.shape[1] ** 0.5)
    size = scenes.pixels.shape[1]
    patch = 16 * (2 if side < size // 16 else 1)
    objects = scenes.objects[scenes.objects["label"] >= 0]
    hits: dict[tuple[int, int], bool] = {}
    for item in objects:
        place = int(best[item["scene"], item["label"]])
        top, left = place // side * patch, place % side * patch
        x0, y0, x1, y1 = item["box"]
        inside = left < x1 and left + patch > x0 and top < y1 and top + patch > y0
        key = (int(item["scene"]), int(item["label"]))
        hits[key] = hits.get(key, False) or bool(inside)
    return float(np.mean(list(hits.values())))


def trained(
    bench: Bench,
    method: str,
    pooling: Pooling,
    training: Training,
    *,
    kind: str = "clearclip",
    mode: str = "full",
    spread: float | None = None,
    words: str | None = None,
) -> dict[str, Any]:
    """One federation; figures of the final state on independent and on correlated labels."""
    started = time.perf_counter()
    setup, weights = setup_of(bench.clip, method, pooling)
    training = dataclasses.replace(training, seed=bench.seed)
    state = {name: value.numpy() for name, value in methods.initial_state(setup, bench.seed).items()}
    for name in [name for name in state if name.endswith("context")]:
        if spread is not None:
            state[name] = state[name] * (spread / methods.CONTEXT_SPREAD)
        if words is not None:
            embedded = bench.clip.token_embedding[bench.clip.tokenize(words)].numpy()
            state[name] = state[name] + embedded
    engine = Engine(setup, training, weights)
    manifest = Described(
        training, {name: TensorSpec("float32", value.shape) for name, value in state.items()}
    )
    sites = {}
    for name, scenes in bench.scenes.clients.items():
        tokens = bench.tokens(name, scenes, kind, mode).numpy()
        sites[name] = SiteData(tokens, scenes.labels, np.arange(len(tokens)), np.arange(0))
    before = figures(bench, engine, state, kind, mode)
    for number in range(0 if training.calibrate else 1, training.rounds + 1):
        differences = []
        for name, data in sites.items():
            if number == 0:
                update = calibrate(engine, data, state, manifest)
            else:
                update = train_round(
                    engine, data, state, manifest, round_number=number, client=name, seed=bench.seed
                )
            differences.append(update.difference)
        changed = {
            key: np.mean([item[key] for item in differences], axis=0, dtype=np.float64)
            for key in differences[0]
        }
        state = {
            key: np.asarray(value + changed.get(key, 0), dtype=np.float32) for key, value in state.items()
        }
    after = figures(bench, engine, state, kind, mode)
    return {
        "seed": bench.seed,
        "method": method,
        "tokens": kind,
        "mode": mode,
        "pooling": pooling.name,
        "tau": pooling.tau,
        "reg": pooling.reg,
        "optimizer": training.optimizer,
        "learning_rate": training.learning_rate,
        "scalar_rate_factor": training.scalar_rate_factor,
        "rounds": training.rounds,
        "calibrate": training.calibrate,
        "spread": methods.CONTEXT_SPREAD if spread is None else spread,
        "words": words,
        "before": before,
        "after": after,
        "scale": float(state["scale"]),
        "bias": float(state["bias"]),
        "seconds": round(time.perf_counter() - started, 1),
    }


@dataclasses.dataclass(frozen=True)
class Described:
    """As much of a manifest as the trainer reads."""

    training: Training
    state: dict[str, TensorSpec]


def figures(bench: Bench, engine: Engine, state: State, kind: str, mode: str) -> dict[str, float]:
    """mAP on both tests and the spurious activation rate at thresholds of equal recall."""
    text = engine.text_features(state)

    def scores(name: str, scenes: SceneSet) -> NDArray[np.float32]:
        return engine.head(state, text, bench.tokens(name, scenes, kind, mode).numpy()).logits

    sets = bench.scenes
    held_out, independent = scores("validation", sets.validation), scores("decorrelated", sets.decorrelated)
    index = {label: number for number, label in enumerate(FEDERATION_LABELS)}
    pairs = [(index[i], index[j]) for planted in sets.plan.pairs.values() for i, j in planted]
    thresholds = recall_thresholds(held_out, sets.validation.truth, RECALL)
    return {
        "mAP": mean_average_precision(independent, sets.decorrelated.truth),
        "mAP correlated": mean_average_precision(
            scores("correlated", sets.correlated), sets.correlated.truth
        ),
        "spurious": spurious_activation_rate(independent >= thresholds, sets.decorrelated.truth, pairs),
    }


def open_bench(seed: int, store: Path, clip: ClipCheckpoint) -> Bench:
    store.mkdir(parents=True, exist_ok=True)
    return Bench(clip, federation_set(seed), store, seed)


def main() -> None:
    """Measure one part and put it into the result file, which keeps the other."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=("untrained", "trained"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="federations (%(default)s)")
    parser.add_argument(
        "--store", type=Path, default=ROOT / "runs" / "method", help="kept tokens (%(default)s)"
    )
    arguments = parser.parse_args()
    clip = load_clip(str(ROOT / "simulation" / "data" / "micro-clip"))
    rows: list[dict[str, Any]] = []
    for seed in arguments.seeds:
        bench = open_bench(seed, arguments.store, clip)
        rows += untrained(bench) if arguments.part == "untrained" else federations(bench)
    result = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(result | {arguments.part: rows}, indent=1) + "\n")


def federations(bench: Bench) -> list[dict[str, Any]]:
    """Both trained sets under each pooling and the optimisers, plain tokens."""
    adamw = dataclasses.replace(PAPER_TRAINING, optimizer="adamw", rounds=10)
    sgd = dataclasses.replace(PAPER_TRAINING, rounds=10)
    chosen = (
        Pooling("max", 1.0, 0.1, 10),
        Pooling("transport", 4.0, 0.02, 10),
        Pooling("transport", 4.0, 0.2, 10),
    )
    return [
        trained(bench, method, pooling, training, kind="plain")
        for method in ("fedmpt-prompts", "fedmpt-full")
        for pooling in chosen
        for training in (adamw, sgd)
    ]


if __name__ == "__main__":
    main()
