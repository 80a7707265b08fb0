"""A round's local work on a small, real model: asymmetric-loss regression on the class token, in NumPy."""

from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import numpy as np
import pytest

from fedmpt.edge_client.answer import answer_round
from fedmpt.edge_client.calibration import asymmetric_loss
from fedmpt.edge_client.engine import EngineError, HeadOutput, predict
from fedmpt.edge_client.metrics import class_f1, mean_average_precision, overall_f1
from fedmpt.edge_client.trainer import (
    SiteData,
    TrainingError,
    TrainingStopped,
    calibrate,
    generator,
    train_round,
)

TRAINING = SimpleNamespace(
    optimizer="sgd",
    learning_rate=0.02,
    momentum=0.9,
    weight_decay=0.0,
    gradient_clip=0.0,
    scalar_rate_factor=10.0,
    batch_size=8,
    epochs=2,
    rounds=4,
    gamma_pos=1.0,
    gamma_neg=2.0,
    clip=0.05,
)


@dataclass
class LinearEngine:
    """logit = κ · (token · weight) + δ on the class token, with exact gradients; remembers its batches."""

    batches: list = field(default_factory=list)
    spoil: str = ""

    def train_step(self, state, tokens, labels):
        self.batches.append(tokens[:, 0].copy())
        x = tokens[:, 0].astype(np.float64)
        scores = x @ state["weight"].T
        logits = state["scale"] * scores + state["bias"]
        known = labels >= 0
        losses, slopes = asymmetric_loss(logits, labels == 1, TRAINING)
        images = max(1, known.any(axis=1).sum())
        slopes = np.where(known, slopes, 0) / images
        gradients = {
            "weight": float(state["scale"]) * slopes.T @ x,
            "scale": (slopes * scores).sum(),
            "bias": slopes.sum(),
        }
        if self.spoil:
            gradients[self.spoil] = gradients[self.spoil] * np.nan
        return float(losses[known].sum() / images), {
            name: np.asarray(value, np.float32) for name, value in gradients.items()
        }

    def text_features(self, state):
        return state["weight"][None]

    def head(self, state, text, tokens):
        scores = (tokens[:, 0].astype(np.float32) @ text[0].T).astype(np.float32)
        logits = state["scale"] * scores + state["bias"]
        return HeadOutput(scores, logits, np.full((*scores.shape, tokens.shape[1] - 1), 0.5, np.float32))


def _site(seed=0, count=45, labels=3, width=6):
    random = np.random.default_rng(seed)
    tokens = random.normal(size=(count, 3, width)).astype(np.float16)
    truth = (tokens[:, 0] @ random.normal(size=(width, labels)) > 0).astype(np.int8)
    truth[random.random(truth.shape) < 0.1] = -1
    rows = random.permutation(count)
    return SiteData(tokens, truth, np.sort(rows[5:]), np.sort(rows[:5]))


def _state(width=6, labels=3):
    return {
        "weight": np.random.default_rng(9).normal(0, 0.1, size=(labels, width)).astype(np.float32),
        "scale": np.asarray(3.0, np.float32),
        "bias": np.asarray(2.0, np.float32),
    }


def _manifest(**changes):
    return SimpleNamespace(training=SimpleNamespace(**{**vars(TRAINING), **changes}))


def _train(engine=None, data=None, manifest=None, **options):
    arguments = {"round_number": 1, "client": "site-a", "seed": 7, **options}
    return train_round(
        engine or LinearEngine(), data or _site(), _state(), manifest or _manifest(), **arguments
    )


def _bits(state):
    return {name: value.tobytes() for name, value in state.items()}


def test_training_lowers_the_loss():
    first, later = (_train(manifest=_manifest(epochs=count)).metrics["loss"] for count in (1, 8))
    assert later < 0.5 * first


def test_two_runs_give_the_same_bits():
    assert _bits(_train().difference) == _bits(_train().difference)


@pytest.mark.parametrize("change", [{"seed": 8}, {"client": "site-b"}, {"round_number": 2}])
def test_seed_client_and_round_each_shuffle_differently(change):
    orders = []
    for options in ({}, change):
        engine = LinearEngine()
        _train(engine, **options)
        orders.append(np.concatenate(engine.batches))
    assert not np.array_equal(*orders)


def test_an_epoch_shows_every_training_photo_once_and_no_validation_photo():
    engine, data = LinearEngine(), _site()
    _train(engine, data, _manifest(epochs=1))
    seen = np.concatenate(engine.batches)
    assert [len(batch) for batch in engine.batches] == [8] * 5
    np.testing.assert_array_equal(np.sort(seen, axis=0), np.sort(data.tokens[data.train, 0], axis=0))


def test_photos_without_a_known_label_are_not_counted():
    data = _site()
    data.labels[data.train[:4]] = -1
    assert _train(data=data).samples == len(data.train) - 4


def test_a_site_without_known_labels_is_told_so():
    data = _site()
    data.labels[:] = -1
    with pytest.raises(TrainingError, match="none of this site's 40 training photos has a known label"):
        _train(data=data)
    with pytest.raises(TrainingError, match="none of this site's 40 training photos has a known label"):
        calibrate(LinearEngine(), data, _state(), _manifest())


def test_the_first_step_follows_the_gradient_with_the_rate_of_the_round_and_of_the_tensor():
    engine, data, manifest = LinearEngine(), _site(), _manifest(batch_size=64, epochs=1)
    _, gradients = engine.train_step(_state(), data.tokens[data.train], data.labels[data.train])
    difference = _train(data=data, manifest=manifest, round_number=3).difference
    rate = TRAINING.learning_rate * 0.5  # half way through four rounds
    np.testing.assert_allclose(difference["weight"], -rate * gradients["weight"], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(difference["bias"], -10 * rate * gradients["bias"], rtol=1e-4)
    np.testing.assert_allclose(difference["scale"], -10 * rate * gradients["scale"], rtol=1e-4)


def test_a_resumed_round_equals_an_uninterrupted_one():
    for optimizer in ("sgd", "adamw"):
        manifest = _manifest(epochs=3, optimizer=optimizer, learning_rate=0.05)
        checkpoints = []
        whole = _train(manifest=manifest, on_epoch=checkpoints.append)
        assert [point.epochs for point in checkpoints] == [1, 2]
        for point in checkpoints:
            resumed = _train(manifest=manifest, resume=point)
            assert _bits(resumed.difference) == _bits(whole.difference)
            assert resumed.metrics == whole.metrics


def test_a_stop_is_obeyed_before_the_next_batch():
    engine = LinearEngine()
    with pytest.raises(TrainingStopped):
        _train(engine, should_stop=lambda: len(engine.batches) == 3)
    assert len(engine.batches) == 3


def test_a_round_out_of_time_returns_what_it_has():
    engine = LinearEngine()
    update = _train(engine, out_of_time=lambda: len(engine.batches) == 3)
    assert len(engine.batches) == 3
    assert np.abs(update.difference["weight"]).max() > 0


def test_a_gradient_that_is_not_finite_is_refused_by_name():
    with pytest.raises(EngineError, match="gradients: bias"):
        _train(LinearEngine(spoil="bias"))


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(TrainingError, match="'lion' in the bundle's manifest is unknown"):
        _train(manifest=_manifest(optimizer="lion"))


def test_the_received_state_is_not_changed():
    state = _state()
    before = _bits(state)
    train_round(LinearEngine(), _site(), state, _manifest(), round_number=1, client="a", seed=1)
    assert _bits(state) == before


def test_progress_counts_batches_over_all_epochs():
    calls = []
    _train(progress=lambda done, total: calls.append((done, total)))
    assert calls == [(number, 10) for number in range(1, 11)]


def test_calibration_changes_scale_and_bias_alone_and_lowers_the_loss():
    engine, data, state = LinearEngine(), _site(), _state()
    before, _ = engine.train_step(state, data.tokens[data.train], data.labels[data.train])
    update = calibrate(engine, data, state, _manifest())
    assert sorted(update.difference) == ["bias", "scale"]
    fitted = {**state, **{name: state[name] + value for name, value in update.difference.items()}}
    after, _ = engine.train_step(fitted, data.tokens[data.train], data.labels[data.train])
    assert after < 0.9 * before
    assert update.metrics["loss"] == pytest.approx(after, rel=1e-4)


def test_a_calibration_out_of_time_fits_the_photos_it_has_scored():
    data, asked = _site(), []

    def out_of_time():
        asked.append(None)
        return len(asked) == 2

    federation = SimpleNamespace(training=TRAINING, federation="test", metrics=True)
    update = answer_round(
        LinearEngine(),
        data,
        _state(),
        federation,
        phase="calibrate",
        round_number=0,
        client="site-a",
        out_of_time=out_of_time,
    )
    assert len(asked) == 2
    assert update.samples == 16 < len(data.train)
    assert update.validation_samples == 5
    half = np.sort(data.train[np.random.default_rng(0).permutation(len(data.train))[:16]])
    expected = calibrate(LinearEngine(), replace(data, train=half), _state(), _manifest())
    for name, value in expected.difference.items():
        np.testing.assert_allclose(update.difference[name], value, rtol=1e-5)


def test_calibration_stops_where_it_is_told_to():
    asked = []

    def should_stop():
        asked.append(None)
        return len(asked) == 2

    progress = []
    with pytest.raises(TrainingStopped):
        calibrate(
            LinearEngine(),
            _site(),
            _state(),
            _manifest(),
            should_stop=should_stop,
            progress=lambda done, total: progress.append(done),
        )
    assert progress == [8, 16]


def test_the_metrics_are_those_of_the_received_state_on_the_validation_split():
    engine, data, state = LinearEngine(), _site(), _state()
    _, logits = predict(engine, state, data.tokens, data.validation, batch_size=8)
    labels = data.labels[data.validation]
    for update in (_train(data=data), calibrate(engine, data, state, _manifest())):
        assert update.metrics["mAP"] == mean_average_precision(logits, labels)
        assert update.metrics["CF1"] == class_f1(logits >= 0, labels)
        assert update.metrics["OF1"] == overall_f1(logits >= 0, labels)
        assert update.validation_samples == 5


def test_figures_that_the_validation_split_does_not_define_are_left_out():
    data = _site()
    data.labels[data.validation] = 0
    assert sorted(_train(data=data).metrics) == ["loss"]
    assert sorted(_train(data=replace(data, validation=data.validation[:0])).metrics) == ["loss"]


def test_generators_of_similar_names_are_unrelated():
    draws = [
        generator(*key).random()
        for key in ((1, "a", 1), (1, "a", 2), (2, "a", 1), (1, "b", 1), (1, "a1", 1), (11, "a", 1))
    ]
    assert len(set(draws)) == len(draws)
