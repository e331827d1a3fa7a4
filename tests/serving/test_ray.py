"""The Ray Serve deployment: its settings, and a real local Ray that serves, balances and drains."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import yaml

from serving.operations.settings import Settings
from serving.ray_app import app, replica_settings, with_cores
from zoo.errors import BadInput

ROOT = Path(__file__).parents[2]
MODEL = "standard-resnet20-cifar10"
CONFIG = ROOT / "deploy" / "ray.yaml"
START_SECONDS, STOP_SECONDS = 60, 60

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed; it is the extra manygates[ray]")


@pytest.mark.skipif(find_spec("ray") is not None, reason="Ray is installed")
def test_without_ray_the_error_names_the_extra_that_brings_it() -> None:
    with pytest.raises(BadInput, match=r"needs 'ray'; install it with `pip install 'manygates\[ray\]'`"):
        app({})


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("grpc_port", 8001),
        ("allow_repository_changes", True),
        ("demo", True),
    ],
)
def test_what_replicas_cannot_share_is_refused_by_its_name(setting: str, value: object) -> None:
    settings = Settings(**{"models": ("any",), setting: value})  # type: ignore[arg-type]
    with pytest.raises(BadInput, match=f"{setting} is {value}, which a Ray Serve deployment has not"):
        replica_settings(settings)


def test_tls_is_rays_to_do_and_never_silently_left_out(tmp_path: Path) -> None:
    for name in ("certificate.pem", "key.pem"):
        (tmp_path / name).touch()
    files = {"tls_certificate": str(tmp_path / "certificate.pem"), "tls_key": str(tmp_path / "key.pem")}
    with pytest.raises(BadInput, match=r"tls_certificate is .*ssl_certfile"):
        replica_settings(Settings(models=("any",), **files))


def test_named_models_stay_and_none_is_the_bundled_ones_that_have_the_mode() -> None:
    assert replica_settings(Settings(models=("a", "b"))).models == ("a", "b")
    single, random = (set(replica_settings(Settings(mode=mode)).models) for mode in ("single", "random"))
    assert random < single


@pytest.mark.parametrize(
    ("given", "cores", "threads"),
    [
        ({}, 1.0, 1),
        ({}, 4.0, 4),
        ({"intra_op": 2}, 4.0, 2),
        ({"intra_op": 4}, 1.0, 1),
        ({"threads": 3}, 1.0, 3),
        ({}, 0.0, 0),  # nothing is reserved, so the server takes what the machine has
        ({"device": "cuda"}, 4.0, 0),
    ],
)
def test_a_replica_runs_as_many_batches_as_ray_reserved_cores_for(
    given: dict[str, Any], cores: float, threads: int
) -> None:
    assert with_cores(Settings(**given), cores).threads == threads


class Ray:
    """A running `serve run` of the config file that is shipped, with other numbers in it."""

    def __init__(self, folder: Path, replicas: int) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        config = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
        config["http_options"]["port"] = self.port
        (application,) = config["applications"]
        application["args"] = {"models": [MODEL], "max_batch": 4}
        (deployment,) = application["deployments"]
        deployment["autoscaling_config"] = {"min_replicas": replicas, "max_replicas": replicas}
        deployment["ray_actor_options"] = {"num_cpus": 0.5}
        file = folder / "ray.yaml"
        file.write_text(yaml.safe_dump(config), encoding="utf-8")
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_TMPDIR": str(folder),
            "PYTHONPATH": str(ROOT),
        }
        self.log = folder / "serve.log"
        with self.log.open("wb") as stream:
            self.process = subprocess.Popen(
                [sys.executable, "-c", "from ray.serve.scripts import cli; cli()", "run", str(file)],
                stdout=stream,
                stderr=stream,
                env=self.environment,
                cwd=folder,
            )

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                if self.ask("GET", "/v2/health/ready")[0] == 200:
                    return
            except OSError:
                pass
            time.sleep(0.2)
        pytest.fail(f"Ray did not start:\n{self.log.read_text(encoding='utf-8', errors='replace')[-4000:]}")

    def ask(self, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()
        finally:
            connection.close()

    def started(self) -> set[str]:
        """Return when the process that answers this time was started."""
        lines = self.ask("GET", "/metrics")[2].decode().splitlines()
        return {line for line in lines if line.startswith("process_start_time_seconds ")}

    def deploy(self, **settings: Any) -> None:
        """Deploy the application again, with other settings."""
        code = "import ray, sys, json; ray.init('auto', logging_level='error'); from ray import serve; "
        code += "from serving.ray_app import app; serve.run(app(json.loads(sys.argv[1])), name='manygates')"
        arguments = json.dumps({"models": [MODEL], **settings})
        done = subprocess.run(
            [sys.executable, "-c", code, arguments],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=START_SECONDS,
            check=False,
        )
        assert done.returncode == 0, done.stderr

    def infer(self, images: np.ndarray) -> tuple[int, np.ndarray]:
        """Return the status, and the probabilities of one raw request."""
        tensor = {"name": "images", "shape": list(images.shape), "datatype": "FP32", "data": images.ravel().tolist()}
        body = json.dumps({"inputs": [tensor], "outputs": [{"name": "probabilities"}]}).encode()
        status, _, content = self.ask("POST", f"/v2/models/{MODEL}/infer", body, Content_Type="application/json")
        if status != 200:
            return status, np.empty(0)
        (output,) = json.loads(content)["outputs"]
        return status, np.asarray(output["data"], dtype=np.float32).reshape(output["shape"])

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


@pytest.fixture(scope="module")
def ray() -> Iterator[Ray]:
    # not pytest's own folder: Ray makes sockets in it, whose paths may have only 107 characters
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        running = Ray(Path(folder), replicas=2)
        try:
            running.wait_until_ready()
            yield running
        finally:
            running.stop()


@needs_ray
@pytest.mark.slow
class TestOnARealRay:
    def test_many_clients_at_once_get_their_own_answers(self, ray: Ray) -> None:
        session = onnxruntime.InferenceSession(ROOT / "zoo" / "bundles" / MODEL / "single.onnx")
        batches = [
            np.random.default_rng(number).random((1 + number % 5, 3, 32, 32), dtype=np.float32) for number in range(40)
        ]
        with ThreadPoolExecutor(12) as clients:
            answers = list(clients.map(ray.infer, batches))
        for images, (status, probabilities) in zip(batches, answers, strict=True):
            assert status == 200
            np.testing.assert_allclose(
                probabilities, session.run(["probabilities"], {"images": images})[0], rtol=1e-4, atol=1e-6
            )

    def test_both_replicas_answer(self, ray: Ray) -> None:
        found: set[str] = set()
        deadline = time.monotonic() + START_SECONDS
        while len(found) < 2 and time.monotonic() < deadline:  # the second may still be starting
            found |= ray.started()
        assert len(found) == 2

    @pytest.mark.parametrize(
        ("method", "path", "status"),
        [
            ("GET", "/v2/models/absent", 404),
            ("GET", "/nowhere", 404),
            ("POST", f"/v2/models/{MODEL}/infer", 400),
            ("GET", "/classify", 405),
        ],
    )
    def test_errors_come_through_in_the_protocols_own_form(self, ray: Ray, method: str, path: str, status: int) -> None:
        got, _, content = ray.ask(method, path, b"{" if method == "POST" else b"")
        assert got == status
        assert set(json.loads(content)) == {"error"}

    def test_a_new_version_takes_over_without_losing_a_request(self, ray: Ray) -> None:
        before = {started for _ in range(40) for started in ray.started()}
        images = np.zeros((32, 3, 32, 32), dtype=np.float32)  # so many that some are always in flight
        statuses: list[int] = []
        stopping = threading.Event()

        def client() -> None:
            while not stopping.is_set():
                try:
                    statuses.append(ray.infer(images)[0])
                except OSError:
                    statuses.append(0)

        clients = [threading.Thread(target=client) for _ in range(3)]
        for thread in clients:
            thread.start()
        try:
            ray.deploy(max_batch=5)
            deadline = time.monotonic() + START_SECONDS
            while ray.started() & before and time.monotonic() < deadline:
                time.sleep(0.2)
            assert not before & {started for _ in range(8) for started in ray.started()}
        finally:
            stopping.set()
            for thread in clients:
                thread.join(30)
        assert len(statuses) > 10
        assert set(statuses) == {200}


def test_the_application_that_ray_is_told_to_import_is_this_one() -> None:
    (application,) = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))["applications"]
    assert application["import_path"] == f"{app.__module__}:{app.__name__}"


def test_what_the_config_file_gives_as_arguments_are_settings() -> None:
    (application,) = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))["applications"]
    settings = replica_settings(Settings.resolve(application["args"], {}))
    assert list(settings.models) == application["args"]["models"]
    assert application["deployments"][0]["graceful_shutdown_timeout_s"] >= settings.drain_timeout


def test_nothing_else_of_the_server_imports_ray() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", "import serving.server, serving.ray_app"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    names = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "serving.ray_app" in names
    assert not any(name == "ray" or name.startswith("ray.") for name in names)
