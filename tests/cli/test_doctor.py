"""``fedmpt doctor``: what it finds, on this machine and on broken ones."""

import datetime
import json
import shutil
import sys
import threading
import time
from pathlib import Path

import pytest

from fedmpt.aggregator.certificates import issue_certificate, make_authority
from fedmpt.cli import main
from fedmpt.edge_client import doctor
from fedmpt.protocol.address import BrokerAddress, parse_broker
from fedmpt.protocol.connection import Connection
from fedmpt.protocol.manifest import load_manifest
from fedmpt.protocol.messages import Status, to_json
from fedmpt.protocol.topics import Topics

NOW = datetime.datetime.now(datetime.timezone.utc)
DAY = datetime.timedelta(days=1)


def _doctor(capsys, *arguments):
    """Exit code, and the checks by name."""
    code = main(["doctor", "--json", *map(str, arguments)])
    result = json.loads(capsys.readouterr().out)
    assert result["ok"] == (code == 0)
    return code, {check["name"]: check for check in result["checks"]}


def test_a_sound_machine_passes_and_every_check_says_what_it_saw(capsys, tiny_bundle, mosquitto):
    code, checks = _doctor(
        capsys,
        "--bundle",
        tiny_bundle,
        "--device",
        "cpu",
        "--broker",
        mosquitto.url,
        "--state-dir",
        "/tmp/none",
    )
    assert code == 0
    assert {
        "python",
        "packages",
        "onnxruntime",
        "disk",
        "memory",
        "bundle",
        "device",
        "broker",
        "clock",
    } <= set(checks)
    assert checks["device"]["text"].startswith("CPU")
    assert checks["broker"]["text"] == f"{mosquitto.url}: accepts us, MQTT 5, no packet limit named"
    assert checks["clock"] == {
        "name": "clock", "status": "unknown", "text": "give --federation to compare it with the aggregator's",
    }  # fmt: skip


def test_without_json_there_is_one_line_per_check(capsys):
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("ok       onnxruntime: ") for line in lines)


def test_a_broken_bundle_and_a_missing_broker_fail(capsys, tiny_bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "CONNECT_SECONDS", 0.3)
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, bundle)
    (bundle / "head.onnx").unlink()
    code, checks = _doctor(capsys, "--bundle", bundle, "--broker", "mqtt://127.0.0.1:1", "--cache", tmp_path)
    assert code == 1
    assert {name for name, check in checks.items() if check["status"] == "failed"} == {
        "bundle",
        "broker",
        "cache",
    }
    assert "head.onnx: missing from the bundle" in checks["bundle"]["text"]
    assert "no feature cache here" in checks["cache"]["text"]


@pytest.mark.parametrize("arguments", [["--cache", "c"], ["--federation", "birds"]])
def test_options_that_need_others_end_with_usage(arguments):
    with pytest.raises(SystemExit) as exit_code:
        main(["doctor", *arguments])
    assert exit_code.value.code == 2


def test_two_onnx_runtimes_are_a_failure_with_the_command_that_mends_it(capsys, monkeypatch):
    import importlib.metadata

    real = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "1.20" if name == "onnxruntime-gpu" else real(name)
    )
    code, checks = _doctor(capsys)
    assert code == 1
    assert (
        "both installed; run: pip uninstall -y onnxruntime onnxruntime-gpu" in checks["onnxruntime"]["text"]
    )


def test_an_nvidia_device_without_cuda_is_a_warning(monkeypatch):
    monkeypatch.setattr(doctor, "nvidia_device", lambda: "an NVIDIA GPU")
    found = {check.name: check for check in doctor.check_versions()}["onnxruntime"]
    assert found.status == "warning"
    assert "an NVIDIA GPU is there" in found.text


class Speaker:
    """Says an aggregator's status again and again, with a clock that is ``ahead``."""

    def __init__(self, url, ahead):
        self._stop = threading.Event()
        self._connection = Connection(parse_broker(url), "aggregator")
        self._connection.connect()
        self._ahead = ahead
        self.say()
        self._thread = threading.Thread(target=self._speak)
        self._thread.start()

    def say(self):
        status = Status("birds", True, 3, 10, "train", 1, 1, 0, 0, 0, None, "", {}, time.time() + self._ahead)
        self._connection.publish(Topics("birds").status, to_json(status), retain=True).wait(5)

    def _speak(self):
        while not self._stop.wait(0.1):
            self.say()

    def silence(self):
        self._stop.set()
        self._thread.join()

    def end(self):
        self.silence()
        self._connection.close()


@pytest.mark.parametrize(
    ("ahead", "status", "text"),
    [(0.0, "ok", "aggregator's"), (-120.0, "warning", "ahead of"), (3600.0, "failed", "behind")],
)
def test_the_clock_is_compared_with_the_aggregators(mosquitto, ahead, status, text):
    speaker = Speaker(mosquitto.url, ahead)
    checks = {check.name: check for check in doctor.check_broker(parse_broker(mosquitto.url), "birds", 10)}
    speaker.end()
    assert checks["aggregator"].text == "online, round 3 of 10 (train)"
    assert checks["clock"].status == status
    assert text in checks["clock"].text


@pytest.mark.parametrize(("ahead", "status"), [(0.0, "unknown"), (3600.0, "failed")])
def test_a_silent_aggregators_last_word_proves_only_that_we_are_behind(mosquitto, ahead, status):
    speaker = Speaker(mosquitto.url, ahead)
    speaker.silence()
    checks = {check.name: check for check in doctor.check_broker(parse_broker(mosquitto.url), "birds", 0.5)}
    speaker.end()
    assert checks["aggregator"].status == "warning"
    assert checks["clock"].status == status


def test_a_federation_that_nobody_knows_is_a_warning(mosquitto):
    checks = {check.name: check for check in doctor.check_broker(parse_broker(mosquitto.url), "bird", 0.5)}
    assert (
        checks["aggregator"].text == "nothing is known of federation bird at this broker; is the name right?"
    )
    assert checks["clock"].status == "unknown"


@pytest.fixture
def certificates(tmp_path):
    make_authority(tmp_path, "birds", NOW)
    issue_certificate(tmp_path, "site-a", NOW, days=100)
    return tmp_path


def _address(folder, **changes):
    files = {
        "authority": folder / "ca.pem",
        "certificate": folder / "site-a.pem",
        "key": folder / "site-a.key",
    }
    return BrokerAddress("127.0.0.1", 1, tls=True, **{**files, **changes})


@pytest.mark.parametrize(
    ("later", "status", "text"),
    [
        (0 * DAY, "ok", "99 days"),
        (80 * DAY, "warning", "ask the operator for a new one"),
        (101 * DAY, "failed", "expired on"),
        (-2 * DAY, "failed", "is this machine's clock right?"),
    ],
)
def test_the_certificates_time_is_judged(certificates, later, status, text):
    checks = {check.name: check for check in doctor.check_certificates(_address(certificates), NOW + later)}
    assert checks["certificate"].status == status
    assert text in checks["certificate"].text
    assert checks["broker certificate"].status == "unknown"


def test_a_key_that_others_can_read_is_a_warning(certificates):
    assert "key" not in {check.name for check in doctor.check_certificates(_address(certificates), NOW)}
    (certificates / "site-a.key").chmod(0o644)
    checks = {check.name: check for check in doctor.check_certificates(_address(certificates), NOW)}
    assert "chmod 600" in checks["key"].text


def test_a_certificate_that_is_none_is_named(certificates):
    (certificates / "site-a.pem").write_text("nothing")
    checks = {check.name: check for check in doctor.check_certificates(_address(certificates), NOW)}
    assert f"{certificates / 'site-a.pem'}: no PEM certificate" in checks["certificate"].text


def test_the_brokers_own_certificate_is_looked_at(certificates, start_mosquitto):
    issue_certificate(certificates, "broker", NOW, days=10, hosts=("127.0.0.1",))
    options = "".join(
        f"{option} {certificates / name}\n"
        for option, name in (("cafile", "ca.pem"), ("certfile", "broker.pem"), ("keyfile", "broker.key"))
    )
    broker = start_mosquitto(options + "require_certificate true\n")
    address = _address(certificates)
    checks = {
        check.name: check
        for check in doctor.check_certificates(BrokerAddress(**{**vars(address), "port": broker.port}), NOW)
    }
    assert checks["broker certificate"].status == "warning"
    assert "valid until" in checks["broker certificate"].text


@pytest.mark.parametrize(
    ("meminfo", "status"),
    [
        ("MemTotal: 8000000 kB\nMemAvailable:    4000000 kB\n", "ok"),
        ("MemAvailable:    500000 kB\n", "warning"),
        ("MemTotal: 1 kB\n", "unknown"),
    ],
)
def test_memory_is_judged_by_what_is_available(meminfo, status):
    assert doctor.check_memory(meminfo).status == status


@pytest.mark.parametrize(("free", "status"), [(10 << 30, "ok"), (1 << 30, "warning"), (1 << 20, "failed")])
def test_disk_is_judged_where_the_folder_would_be_made(tmp_path, monkeypatch, free, status):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, free))
    check = doctor.check_disk(tmp_path / "not" / "yet")
    assert check.status == status
    assert f"free at {tmp_path}" in check.text


def test_nothing_of_pytorch_is_imported():
    import subprocess

    code = "import sys; from fedmpt.cli import main; main(['doctor']); print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "False"


def test_the_bundle_names_its_digest(tiny_bundle):
    checks = list(doctor.check_bundle(Path(tiny_bundle), "cpu"))
    assert load_manifest(tiny_bundle).digest[:12] in checks[0].text
