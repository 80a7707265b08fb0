"""``fedmpt client`` as a process, with real aggregators and brokers."""

import contextlib
import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedmpt.aggregator.rounds import RoundSettings
from fedmpt.aggregator.settings import FederationSettings
from fedmpt.aggregator.strategies import StrategySettings
from fedmpt.cli import main
from fedmpt.edge_client.cache import build_cache, open_cache
from fedmpt.edge_client.datasets import LabelledPhoto
from fedmpt.edge_client.engine import open_engine
from fedmpt.edge_client.trainer import SiteData
from fedmpt.protocol.codec import load_provenance, load_state
from fedmpt.protocol.manifest import load_manifest, save_manifest
from fedmpt.simulation.simulator import simulate

PATIENCE = 240
SITES = ("site-a", "site-b")
FEDMPT = [sys.executable, "-c", "import sys; from fedmpt.cli import main; sys.exit(main())"]


@pytest.fixture(scope="module")
def bundle(tiny_bundle, tmp_path_factory):
    """The tiny bundle with so many epochs that a round outlasts several checkpoints, also on a fast machine."""
    folder = tmp_path_factory.mktemp("bundle") / "tiny"
    shutil.copytree(tiny_bundle, folder)
    manifest = load_manifest(folder)
    training = dataclasses.replace(manifest.training, epochs=1500, rounds=1, learning_rate=1e-3)
    save_manifest(folder, dataclasses.replace(manifest, training=training))
    return folder


@pytest.fixture(scope="module")
def caches(bundle, tmp_path_factory):
    """A feature cache of a few coloured noise pictures per site."""
    folder = tmp_path_factory.mktemp("caches")
    for number, name in enumerate(SITES):
        random = np.random.default_rng(number)
        photos = []
        for index in range(20):
            path = folder / f"{name}-{index}.png"
            Image.fromarray(random.integers(0, 256, (48, 48, 3), dtype=np.uint8)).save(path)
            photos.append(LabelledPhoto(path, random.integers(0, 2, 4).astype(np.int8)))
        build_cache(photos, bundle, folder / name, device="cpu", threads=1)
    return folder


class Federation:
    """Processes of one federation in one folder; every process is killed in the end."""

    def __init__(self, bundle, caches, folder, broker):
        self.folder, self.running = folder, {}
        self._caches = caches
        self._shared = ["--bundle", bundle, "--federation", "birds", "--broker", broker]
        folder.mkdir(exist_ok=True)

    def start(self, name, *arguments):
        log, out = (self.folder / f"{name}.{kind}" for kind in ("log", "out"))
        with log.open("ab") as errors, out.open("ab") as results:
            self.running[name] = subprocess.Popen(
                [*FEDMPT, *map(str, arguments)], cwd=self.folder, stdout=results, stderr=errors
            )

    def start_aggregator(self, *more):
        rule = [
            "--clients-min",
            2,
            "--store",
            self.folder / "store",
            "--out",
            self.folder / "final.safetensors",
        ]
        self.start("aggregator", "aggregator", *self._shared, *rule, *more)

    def start_client(self, name):
        site = ["--name", name, "--cache", self._caches / name, "--state-dir", self.folder / f"{name}-state"]
        limits = ["--out", self.folder / f"{name}.safetensors", "--threads", 1, "--device", "cpu", "--json"]
        self.start(name, "client", *self._shared, *site, *limits)

    def events(self, name):
        return [json.loads(line) for line in (self.folder / f"{name}.out").read_text().splitlines()]

    def wait_until(self, condition, what):
        end = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < end, f"never: {what}\n{self.logs()}"
            time.sleep(0.02)

    def finish(self):
        for name, process in self.running.items():
            assert process.wait(PATIENCE) == 0, f"{name}\n{self.logs()}"
        return (self.folder / "final.safetensors").read_bytes()

    def logs(self):
        return "\n".join(f"--- {path.name}\n{path.read_text()[-3000:]}" for path in self.folder.glob("*.log"))

    def end(self):
        for process in self.running.values():
            process.kill()
            process.wait()


@pytest.fixture
def federation(bundle, caches, tmp_path):
    with contextlib.ExitStack() as running:

        def start(name, broker, bundle=bundle):
            made = Federation(bundle, caches, tmp_path / name, broker)
            running.callback(made.end)
            return made

        yield start


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_client_and_a_restarted_broker_do_not_change_one_bit_of_the_result(
    federation, mosquitto, bundle, caches, free_port
):
    calm = federation("calm", f"mqtt://127.0.0.1:{free_port()}")
    calm.start_aggregator("--embedded")
    for name in SITES:
        calm.start_client(name)
    undisturbed = calm.finish()

    rough = federation("rough", mosquitto.url)
    rough.start_aggregator()
    for name in SITES:
        rough.start_client(name)
    state = rough.folder / "site-a-state"
    rough.wait_until(lambda: list(state.glob("checkpoint-*.safetensors")), "site-a in the middle of a round")
    rough.running["site-a"].kill()
    rough.running["site-a"].wait()
    assert list(state.glob("checkpoint-*.safetensors")), "the kill came too late for this test"
    mosquitto.kill()
    rough.start_client("site-a")
    time.sleep(1)
    mosquitto.start()

    assert rough.finish() == undisturbed
    simulated = _simulate(bundle, caches)
    final = load_state(rough.folder / "final.safetensors", load_manifest(bundle).state)
    initial = load_state(bundle / "state.safetensors", load_manifest(bundle).state)
    assert any(not np.array_equal(final[name], initial[name]) for name in final)
    assert all(np.array_equal(final[name], simulated[name]) for name in final)
    for name in SITES:
        saved = load_state(rough.folder / f"{name}.safetensors", load_manifest(bundle).state)
        assert all(np.array_equal(saved[key], final[key]) for key in final)
    assert load_provenance(rough.folder / "site-a.safetensors")["federation"] == "birds"
    resumed = [event["event"] for event in rough.events("site-a")]
    assert resumed.count("connected") >= 2
    assert resumed[-2:] == ["finished", "saved"]


def _simulate(bundle, caches):
    """The same federation in this process."""
    manifest = load_manifest(bundle)
    sites = {}
    for name in SITES:
        cache = open_cache(caches / name, manifest)
        sites[name] = SiteData(cache.tokens, cache.labels, *cache.split())
    rounds = RoundSettings(manifest.training.rounds, manifest.training.calibrate, clients_min=len(sites))
    settings = FederationSettings("birds", rounds, StrategySettings())
    engine = open_engine(bundle, "onnx", "cpu", threads=1)
    initial = load_state(bundle / "state.safetensors", manifest.state)
    return simulate(engine, manifest, initial, sites, settings).state


@pytest.mark.slow
def test_sigterm_in_the_middle_of_a_round_ends_a_client_cleanly(federation, mosquitto):
    birds = federation("birds", mosquitto.url)
    birds.start_aggregator()
    for name in SITES:
        birds.start_client(name)
    state = birds.folder / "site-a-state"
    birds.wait_until(lambda: list(state.glob("checkpoint-*.safetensors")), "site-a in the middle of a round")
    birds.running["site-a"].send_signal(signal.SIGTERM)
    assert birds.running["site-a"].wait(20) == 0, birds.logs()
    assert [event["event"] for event in birds.events("site-a")][-2:] == ["interrupted", "stopped"]
    assert list(state.glob("checkpoint-*.safetensors"))


@pytest.mark.slow
def test_a_site_that_is_stopped_frees_its_place_and_the_round_closes(federation, mosquitto):
    birds = federation("birds", mosquitto.url)
    birds.start_aggregator("--deadline", "never")
    for name in SITES:
        birds.start_client(name)
    state = birds.folder / "site-a-state"
    birds.wait_until(lambda: list(state.glob("checkpoint-*.safetensors")), "site-a in the middle of a round")
    birds.running["site-a"].send_signal(signal.SIGTERM)
    assert birds.running.pop("site-a").wait(20) == 0, birds.logs()
    birds.finish()
    history = [json.loads(line) for line in (birds.folder / "store/history.jsonl").read_text().splitlines()]
    assert [(record["chosen"], list(record["bytes"])) for record in history] == [
        (2, ["site-a", "site-b"]),
        (2, ["site-b"]),
    ]


@pytest.mark.slow
def test_a_client_waits_for_the_next_run_where_the_broker_still_has_the_last_ones_end(
    federation, mosquitto, bundle, caches, tmp_path
):
    short = shutil.copytree(bundle, tmp_path / "bundle")
    manifest = load_manifest(short)
    save_manifest(
        short, dataclasses.replace(manifest, training=dataclasses.replace(manifest.training, epochs=1))
    )
    first = federation("first", mosquitto.url, short)
    first.start_aggregator()
    for name in SITES:
        first.start_client(name)
    first.finish()
    first.running.clear()

    first.start_client("site-a")  # as its unit is started again, before the aggregator is
    first.wait_until(
        lambda: "the next run" in first.events("site-a")[-1].get("for", ""), "site-a waiting for the next run"
    )
    second = federation("second", mosquitto.url, short)
    second.start_aggregator()
    second.start_client("site-b")
    second.finish()
    assert first.running["site-a"].wait(PATIENCE) == 0
    events = [event["event"] for event in first.events("site-a")]
    assert events.count("finished") == 2
    assert events.count("trained") == 4
    manifest = load_manifest(short)
    mine, theirs = (
        load_state(path, manifest.state)
        for path in (first.folder / "site-a.safetensors", second.folder / "final.safetensors")
    )
    assert all(np.array_equal(mine[name], theirs[name]) for name in theirs)


def test_sigterm_while_no_broker_answers_ends_a_client_cleanly(federation, caches, free_port):
    birds = federation("birds", f"mqtt://127.0.0.1:{free_port()}")
    birds.start_client("site-a")
    state = birds.folder / "site-a-state"
    birds.wait_until(state.exists, "site-a about to connect")
    birds.running["site-a"].send_signal(signal.SIGTERM)
    assert birds.running["site-a"].wait(10) == 0, birds.logs()
    assert [event["event"] for event in birds.events("site-a")] == ["stopped"]


def _arguments(tmp_path, **changes):
    options = {
        "bundle": tmp_path, "cache": tmp_path, "federation": "birds", "name": "site-a",
        "broker": "mqtt://127.0.0.1:1", **changes,
    }  # fmt: skip
    return ["client", *(f"--{name}={value}" for name, value in options.items() if value is not None)]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"broker": None}, "give the federation's broker with --broker"),
        ({"broker": "http://hub"}, "write mqtt://host:1883"),
        ({"name": "site a"}, "client name 'site a' cannot be used"),
        ({"federation": "b/c"}, "federation name 'b/c' cannot be used"),
        ({}, "manifest.json: not found"),
    ],
)
def test_bad_options_end_with_exit_code_1_and_a_text_that_names_them(tmp_path, capsys, changes, text):
    assert main(_arguments(tmp_path, **changes)) == 1
    assert text in capsys.readouterr().err


@pytest.mark.parametrize(
    "option", ["--threads=0", "--validation=1", "--active=22-6", "--max-seconds-per-round=-1"]
)
def test_values_out_of_range_end_with_usage(tmp_path, capsys, option):
    with pytest.raises(SystemExit) as exit_code:
        main([*_arguments(tmp_path), option])
    assert exit_code.value.code == 2
    assert option.split("=")[0] in capsys.readouterr().err


def test_a_broker_that_is_not_there_is_named(bundle, caches, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fedmpt.edge_client.site_connection.CONNECT_SECONDS", 0.5)
    arguments = _arguments(tmp_path, bundle=bundle, cache=caches / "site-a", device="cpu", threads=1)
    assert main(arguments) == 1
    assert "broker mqtt://127.0.0.1:1: " in capsys.readouterr().err


def test_an_altered_bundle_is_refused(bundle, caches, tmp_path, capsys):
    altered = tmp_path / "altered"
    shutil.copytree(bundle, altered)
    with (altered / "train_step.onnx").open("ab") as file:
        file.write(b"\0")
    assert main(_arguments(tmp_path, bundle=altered, cache=caches / "site-a")) == 1
    assert "train_step.onnx: differs from its digest" in capsys.readouterr().err


def test_options_come_from_a_file_where_the_command_line_has_none(bundle, tmp_path, capsys):
    config = tmp_path / "fedmpt.toml"
    config.write_text('[client]\nfederation = "birds"\nname = "site-a"\nbroker = "mqtt://h"\nnise = 3\n')
    assert main(["client", "--config", str(config), f"--bundle={bundle}", f"--cache={tmp_path}"]) == 1
    assert "nise is unknown; did you mean nice?" in capsys.readouterr().err
    config.write_text(config.read_text().replace("nise = 3", 'active = "22-6"'))
    assert main(["client", "--config", str(config), f"--bundle={bundle}", f"--cache={tmp_path}"]) == 1
    assert "such as 22:00-06:00" in capsys.readouterr().err
    config.write_text(config.read_text().replace('active = "22-6"', 'active = "22:00-06:00"'))
    assert main(["client", "--config", str(config), f"--bundle={bundle}", f"--cache={tmp_path}"]) == 1
    assert f"{Path(tmp_path)}: no feature cache here" in capsys.readouterr().err
