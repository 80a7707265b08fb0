"""The micro-CLIP: it can be trained, resumed to the same bits, and the shipped weights are a CLIP that works."""

import json
import os
import re
import shutil
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save
from transformers import CLIPModel, CLIPProcessor

from fedmpt.simulation import micro_clip
from fedmpt.simulation import micro_clip_captions as captions
from fedmpt.simulation.micro_clip import Recipe, Stage, Trainer, train
from fedmpt.simulation.micro_clip_checkpoint import CheckpointError
from fedmpt.simulation.micro_clip_data import SceneFolder
from fedmpt.simulation.micro_clip_model import (
    WEIGHTS,
    image_tokens,
    load_micro_clip,
    save_model,
    text_features,
)
from fedmpt.simulation.micro_clip_tokenizer import make_tokenizer
from fedmpt.simulation.scenes_sets import pretrain_specification

COUNT = 48
TINY = Recipe(
    stages=(
        Stage(1, 4, 4, 1e-3, 0.0, 10.0, easy_until=0.3, anchors_until=0.75),
        Stage(2, 2, 4, 1e-3, 0.0, 4.0, anchors_until=1.0, of_photos=True),
    ),
    batch=4,
    captions=4,
    checkpoint_every=2,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return SceneFolder(tmp_path_factory.mktemp("scenes"), pretrain_specification(), COUNT, 0)


@pytest.fixture(scope="module")
def scenes(folder):
    return folder.render()


@pytest.fixture(scope="module")
def shipped():
    return load_micro_clip()


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


def stop_at(step):
    """A report that interrupts the training after `step`."""

    def report(task, note, done, total):
        if task == "training" and done == step:
            raise KeyboardInterrupt

    return report


@pytest.fixture(scope="module")
def finished(tmp_path_factory, folder):
    """The folder of a training without interruption."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("finished")
    train(TINY, (folder, folder), out)
    return out


@pytest.fixture
def begun(tmp_path, finished):
    """A folder with a checkpoint of the whole training, to be changed."""
    shutil.copy(finished / "checkpoint.safetensors", tmp_path)
    return tmp_path


def test_a_training_resumed_in_the_middle_of_stages_ends_at_the_same_bits(tmp_path, folder, finished):
    for step in (
        3,
        5,
    ):  # goes on from 2, where anchors help, and from 4, where they rest until the second stage
        with pytest.raises(KeyboardInterrupt):
            train(TINY, (folder, folder), tmp_path, stop_at(step))
    model = train(TINY, (folder, folder), tmp_path)
    for path in (tmp_path / "checkpoint.safetensors", model / "model.safetensors"):
        whole, resumed = load_file(finished / path.relative_to(tmp_path)), load_file(path)
        assert whole.keys() == resumed.keys()
        for name, tensor in whole.items():
            assert torch.equal(tensor, resumed[name]), name


def test_a_training_without_anchors_can_be_resumed(tmp_path, folder):
    recipe = replace(TINY, stages=(Stage(1, 2, 2, 1e-3, 0.0, 10.0),), checkpoint_every=1)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, (folder,), tmp_path, stop_at(1))
    train(recipe, (folder,), tmp_path)
    names = load_file(tmp_path / "checkpoint.safetensors").keys()
    assert "exp_avg.biases" in names
    assert "exp_avg.anchors" not in names


def test_the_curve_of_a_resumed_training_goes_on_in_rows_and_seconds(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(micro_clip, "ROW_EVERY", 1)
    recipe = replace(TINY, stages=TINY.stages[:1])
    with pytest.raises(KeyboardInterrupt):
        train(recipe, (folder,), tmp_path, stop_at(2))
    curve = tmp_path / "curve.csv"
    head, first, second = curve.read_text().splitlines()
    beyond = "3,9.9999,9999"  # written before a checkpoint that was not
    curve.write_text("\n".join([head, first, second.rsplit(",", 1)[0] + ",5000", beyond]) + "\n")
    train(recipe, (folder,), tmp_path)
    rows = [row.split(",") for row in curve.read_text().splitlines()[1:]]
    assert [row[0] for row in rows] == ["1", "2", "3", "4"]
    assert 5000 <= int(rows[2][2]) <= int(rows[3][2]) < 6000


def test_what_a_killed_training_left_half_written_is_removed(folder, begun):
    leftover = begun / ".checkpoint.safetensors.0123456789abcdef.part"
    leftover.touch()
    train(TINY, (folder, folder), begun)
    assert not leftover.exists()


def test_a_finished_training_writes_its_model_without_scenes(begun, folder, tmp_path_factory):
    nowhere = replace(folder, path=tmp_path_factory.mktemp("none") / "scenes")
    model = train(TINY, (nowhere, nowhere), begun)
    assert (model / "model.safetensors").exists()
    assert not nowhere.path.exists()


@pytest.mark.parametrize(
    ("recipe", "seed", "wanted"),
    [
        (replace(TINY, seed=7), 0, "another recipe; train into another folder"),
        (TINY, 1, "another set of scenes; train into another folder"),
    ],
)
def test_a_checkpoint_of_another_training_is_refused_before_scenes_are_drawn(
    begun, folder, recipe, seed, wanted
):
    other = replace(folder, path=begun / "scenes", seed=seed)
    with pytest.raises(CheckpointError, match=wanted):
        train(recipe, (other, other), begun)
    assert not other.path.exists()


def test_a_checkpoint_of_other_captions_is_refused(begun, folder, monkeypatch):
    monkeypatch.setattr(captions, "_LABEL", ("a drawing of a {x}.",))
    with pytest.raises(CheckpointError, match="another set of captions; train into another folder"):
        train(TINY, (folder, folder), begun)


def test_other_threads_go_on_and_say_so(begun, folder, capsys):
    torch.set_num_threads(2)
    try:
        train(TINY, (folder, folder), begun)
    finally:
        torch.set_num_threads(1)
    line = f"trained with threads 1 and torch {torch.__version__}, goes on with threads 2 and"
    assert line in capsys.readouterr().err


def test_a_damaged_checkpoint_is_refused(begun, folder):
    path = begun / "checkpoint.safetensors"
    whole = path.read_bytes()
    foreign = save({"weight": torch.zeros(2)})
    older = save(load_file(path), {"step": "6", "recipe": json.dumps(asdict(TINY))})
    for content in (b"", b"nonsense" * 9, whole[:-9], foreign, older):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"checkpoint\.safetensors: damaged, or no .* delete it"):
            train(TINY, (folder, folder), begun)


def run_main(capsys, *words):
    """Exit status and what was said on stderr, of the command."""
    try:
        status = micro_clip.main([*map(str, words)])
    except SystemExit as end:
        status = end.code
    return status, capsys.readouterr().err


@pytest.fixture
def small(monkeypatch):
    """A command that trains for one step on few pictures."""
    torch.set_num_threads(1)
    recipe = replace(TINY, stages=(Stage(2, 1, 1, 1e-3, 0.0, 1.0),))
    monkeypatch.setattr(micro_clip, "RECIPE", recipe)
    monkeypatch.setattr(micro_clip, "PICTURES", (8, 8))


def test_the_command_shows_life_in_a_log_and_says_where_the_model_is(tmp_path, small, capsys):
    assert micro_clip.main(["--out", str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert said.out == f"model: {tmp_path / 'micro-clip'}\n"
    first, second, trained = said.err.splitlines()[:3]  # what follows is transformers' own, about its file
    assert [first, second] == ["scenes-1: 8/8", "scenes-2: 8/8"]
    assert re.fullmatch(r"training: 1/1, loss [\d.]+, \d+ s", trained)


@pytest.mark.parametrize("option", [("--threads", 0), ("--threads", "x"), ("--seed", -1)])
def test_wrong_usage_is_exit_status_2(tmp_path, small, capsys, option):
    status, said = run_main(capsys, "--out", tmp_path, *option)
    assert status == 2
    assert option[0] in said.splitlines()[-1]


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_place_that_cannot_be_a_folder_is_one_line(tmp_path, small, capsys, place):
    (tmp_path / "file").touch()
    status, said = run_main(capsys, "--out", tmp_path / place)
    assert status == 1
    assert re.fullmatch(rf"micro_clip: \S+/{place}: .*; give --out a folder that you may write.*\n", said)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_is_one_line(tmp_path, small, capsys):
    tmp_path.chmod(0o500)
    status, said = run_main(capsys, "--out", tmp_path)
    assert status == 1
    assert re.fullmatch(r"micro_clip: .*Permission denied; give --out a folder that you may write.*\n", said)


def test_a_foreign_checkpoint_is_one_line(tmp_path, small, capsys):
    (tmp_path / "checkpoint.safetensors").write_bytes(b"nonsense")
    status, said = run_main(capsys, "--out", tmp_path)
    assert status == 1
    assert re.fullmatch(r"micro_clip: .*checkpoint\.safetensors: damaged.*delete it.*\n", said)


def test_an_interrupted_command_says_how_to_go_on(tmp_path, small, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "train_step", interrupt)
    status, said = run_main(capsys, "--out", tmp_path)
    assert status == 130
    assert "the same command goes on from the last checkpoint" in said


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
