"""The micro-CLIP: it can be trained, resumed to the same bits, and the shipped weights are a CLIP that works."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import CLIPModel, CLIPProcessor

from fedmpt.simulation.micro_clip import (
    CheckpointError,
    Recipe,
    Stage,
    Trainer,
    train,
)
from fedmpt.simulation.micro_clip_data import render_training_set
from fedmpt.simulation.micro_clip_evaluation import (
    encode_scenes,
    mean_average_precision,
    pointing,
    zero_shot,
)
from fedmpt.simulation.micro_clip_model import (
    WEIGHTS,
    image_tokens,
    load_micro_clip,
    save_model,
    text_features,
)
from fedmpt.simulation.micro_clip_tokenizer import make_tokenizer
from fedmpt.simulation.scenes import SceneSpecification, draw_scenes
from fedmpt.simulation.scenes_sets import pretrain_specification

COUNT = 48
TINY = Recipe(
    stages=(
        Stage(1, 3, 3, 1e-3, 0.0, 10.0, easy_until=0.3, anchors_until=0.7),
        Stage(2, 3, 4, 1e-3, 0.0, 4.0, of_photos=True),
    ),
    batch=4,
    captions=4,
    checkpoint_every=3,
)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return render_training_set(tmp_path_factory.mktemp("scenes"), pretrain_specification(), COUNT, 0)


@pytest.fixture(scope="module")
def shipped():
    return load_micro_clip()


def test_the_training_set_goes_on_where_it_was_interrupted(tmp_path, monkeypatch, scenes):
    monkeypatch.setattr("fedmpt.simulation.micro_clip_data.CHUNK", 20)

    def interrupt(done, total):
        if done == 40:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        render_training_set(tmp_path, pretrain_specification(), COUNT, 0, interrupt)
    begun = []
    resumed = render_training_set(
        tmp_path, pretrain_specification(), COUNT, 0, lambda done, total: begun.append(done)
    )
    assert begun == [48]
    assert np.array_equal(resumed.pixels, scenes.pixels)
    assert np.array_equal(resumed.attributes, scenes.attributes)


def test_the_vocabulary_is_laid_out_like_clips_own():
    tokenizer = make_tokenizer()
    assert tokenizer.eos_token_id == len(tokenizer) - 1
    assert tokenizer.bos_token_id == len(tokenizer) - 2
    ids = tokenizer("a photo of a dining table.")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert ids[-1] == tokenizer.eos_token_id
    assert len(ids) == 9  # every word of a caption is one token
    assert make_tokenizer().get_vocab() == tokenizer.get_vocab()
    assert tokenizer.eos_token_id not in tokenizer("Übergrößenträger, 猫!")["input_ids"][1:-1]


def test_a_few_steps_reduce_the_loss(scenes):
    torch.set_num_threads(1)
    trainer = Trainer(replace(TINY, stages=(Stage(1, 12, 12, 1e-3, 0.0, 10.0),)))
    losses = [trainer.train_step(scenes) for _ in range(12)]
    assert np.mean(losses[-3:]) < 0.9 * np.mean(losses[:3])


def test_a_resumed_training_ends_at_the_same_bits(tmp_path, scenes):
    torch.set_num_threads(1)
    whole = train(TINY, (scenes, scenes), tmp_path / "whole")

    def interrupt(done, total):
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(TINY, (scenes, scenes), tmp_path / "parts", interrupt)
    resumed = train(TINY, (scenes, scenes), tmp_path / "parts")
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name]), name


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path, scenes):
    Trainer(TINY).save(tmp_path / "checkpoint.safetensors")
    with pytest.raises(CheckpointError, match="another recipe: train into another folder"):
        train(replace(TINY, seed=7), (scenes, scenes), tmp_path)


def test_a_saved_model_loads_as_any_clip_and_says_the_same(tmp_path):
    trainer = Trainer(TINY)
    model, tokenizer = trainer.model.eval(), trainer.tokenizer
    save_model(model, tokenizer, tmp_path)
    loaded, processor = (
        CLIPModel.from_pretrained(tmp_path, dtype=torch.float32),
        CLIPProcessor.from_pretrained(tmp_path),
    )
    pixels = np.random.default_rng(0).integers(0, 256, (2, 112, 112, 3), np.uint8)
    texts = ["a photo of a cat.", "a photo of a dining table in fog."]
    with torch.no_grad():
        inputs = processor(text=texts, images=list(pixels), return_tensors="pt", padding=True)
        theirs = loaded(**inputs)
        assert torch.allclose(theirs.image_embeds, image_tokens(model, pixels)[:, 0], atol=2e-3)
        assert torch.allclose(theirs.text_embeds, text_features(model, tokenizer, texts), atol=2e-3)


def test_the_shipped_weights_are_small_and_finite(shipped):
    assert sum(path.stat().st_size for path in WEIGHTS.iterdir()) <= 10_000_000
    assert all(torch.isfinite(weight).all() for weight in shipped[0].state_dict().values())


def test_the_shipped_weights_recognise_fresh_scenes(shipped):
    scenes = draw_scenes(SceneSpecification(), 300, seed=424242)
    tokens = encode_scenes(shipped[0], scenes.pixels)
    figures = zero_shot(*shipped, scenes, tokens)
    assert figures["class_token"] >= 0.80
    assert figures["best_patch"] >= 0.88
    assert pointing(*shipped, scenes, tokens)["centre_in_box"] >= 0.90


def test_mean_average_precision_on_a_ranking_done_by_hand():
    scores = np.array([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4]])
    labels = np.array([[1, 0], [0, 0], [1, 0], [0, 0]])
    assert mean_average_precision(scores, labels) == pytest.approx((1 + 2 / 3) / 2)
