"""What deployments are described with: manifests that fit the server, and the image's health check."""

import json
import re
import shutil
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

import manygates.cli
from serving.health_check import address, reason_against
from serving.operations.settings import Settings, setting_fields

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
HTTP_PORT, GRPC_PORT = 8000, 8001


def documents(name: str) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all((ROOT / name).read_text(encoding="utf-8")) if document]


def pods() -> dict[str, dict[str, Any]]:
    """What runs the server under Kubernetes: the specification of each pod."""
    (deployment,) = [document for document in documents("deploy/kubernetes.yaml") if document["kind"] == "Deployment"]
    runtime, service = documents("deploy/kserve.yaml")
    # KServe merges the two into one pod
    predictor = {key: value for key, value in service["spec"]["predictor"].items() if key in OF_PODS}
    merged = {key: value for key, value in runtime["spec"].items() if key in OF_PODS} | predictor
    return {"kubernetes": deployment["spec"]["template"]["spec"], "kserve": merged}


OF_PODS = {"containers", "volumes", "terminationGracePeriodSeconds", "automountServiceAccountToken", "securityContext"}
COMPOSE = documents("compose.yaml")[0]["services"]["manygates"]


def environments() -> dict[str, dict[str, str]]:
    """Every environment that a description gives to the server."""
    image = re.findall(r"\b(MANYGATES_SERVE_\w+)=(\S+)", DOCKERFILE)
    found = {"Dockerfile": dict(image), "compose": COMPOSE["environment"]}
    for name, pod in pods().items():
        found[name] = {entry["name"]: entry["value"] for entry in pod["containers"][0]["env"]}
    return found


def commands() -> dict[str, list[str]]:
    """Every command that a description runs."""
    (image,) = re.findall(r"^CMD (\[.*\])$", DOCKERFILE, re.MULTILINE)
    return {"Dockerfile": json.loads(image), "compose": COMPOSE["command"]} | {
        name: pod["containers"][0]["args"] for name, pod in pods().items()
    }


@pytest.mark.parametrize("place", environments())
def test_every_setting_in_a_description_is_one_of_the_servers(place: str) -> None:
    environment = {**environments()["Dockerfile"], **environments()[place]}
    environment.pop("MANYGATES_SERVE_DEVICE", None)  # of the CUDA variant alone; this machine may have no GPU
    assert Settings.resolve({}, environment).grpc_port == GRPC_PORT


@pytest.mark.parametrize("place", commands())
def test_every_command_in_a_description_is_one_that_the_command_line_takes(place: str) -> None:
    program, *arguments = commands()[place]
    assert program == "manygates"
    parsed = manygates.cli.parser().parse_args(arguments)
    assert parsed.host == "0.0.0.0"


def test_what_docs_tell_to_set_is_a_setting_or_documented_as_one_of_others() -> None:
    text = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
    known = {f"MANYGATES_SERVE_{name.upper()}" for name in setting_fields()} | {"MANYGATES_SERVE_CONFIG"}
    named = set(re.findall(r"MANYGATES_SERVE_[A-Z_]+[A-Z]", text))
    assert named
    assert named <= known


def test_the_ports_are_the_same_everywhere() -> None:
    assert re.findall(r"^EXPOSE (.*)$", DOCKERFILE, re.MULTILINE) == [f"{HTTP_PORT} {GRPC_PORT}"]
    assert Settings().port == HTTP_PORT
    assert COMPOSE["ports"] == [f"127.0.0.1:{port}:{port}" for port in (HTTP_PORT, GRPC_PORT)]
    for pod in pods().values():
        assert [port["containerPort"] for port in pod["containers"][0]["ports"]] == [HTTP_PORT, GRPC_PORT]
    (service,) = [document for document in documents("deploy/kubernetes.yaml") if document["kind"] == "Service"]
    names = {port["name"] for port in pods()["kubernetes"]["containers"][0]["ports"]}
    assert {port["targetPort"] for port in service["spec"]["ports"]} == names
    runtime = documents("deploy/kserve.yaml")[0]
    assert runtime["spec"]["annotations"]["prometheus.kserve.io/port"] == str(HTTP_PORT)
    (job,) = documents("deploy/prometheus.yml")[0]["scrape_configs"]
    assert job["static_configs"] == [{"targets": [f"manygates:{HTTP_PORT}"]}]


@pytest.fixture(scope="module")
def paths() -> set[str]:
    """The paths that the application answers."""
    from serving.server import build
    from zoo.hub.source import list_bundled

    application = build(Settings(models=(list_bundled()[0].name,), threads=1))
    return {route.path for route in application.starlette.routes}  # type: ignore[attr-defined]


@pytest.mark.parametrize("place", ["kubernetes", "kserve"])
def test_every_probe_asks_a_path_that_the_server_answers(place: str, paths: set[str]) -> None:
    (container,) = pods()[place]["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    for probe, path in (("startup", "ready"), ("readiness", "ready"), ("liveness", "live")):
        asked = container[f"{probe}Probe"]["httpGet"]
        assert asked["path"] == f"/v2/health/{path}"
        assert asked["path"] in paths
        assert ports.get(asked["port"], asked["port"]) == HTTP_PORT
    assert address({}).removeprefix(f"http://127.0.0.1:{HTTP_PORT}") in paths


@pytest.mark.parametrize("place", ["compose", "kubernetes", "kserve"])
def test_there_is_time_to_drain_before_the_orchestrator_kills(place: str) -> None:
    settings = Settings.resolve({}, {name: value for name, value in environments()[place].items() if "DRAIN" in name})
    if place == "compose":
        grace = float(COMPOSE["stop_grace_period"].removesuffix("s"))
    else:
        grace = float(pods()[place]["terminationGracePeriodSeconds"])
    assert grace >= settings.drain_delay + 2 * settings.drain_timeout + 10


def in_bytes(size: str) -> int:
    units = {"Gi": 2**30, "Mi": 2**20, "g": 2**30, "m": 2**20}
    (unit,) = [unit for unit in units if size.endswith(unit)]
    return int(size.removesuffix(unit)) * units[unit]


@pytest.mark.parametrize("place", ["compose", "kubernetes", "kserve"])
def test_what_requests_may_hold_fits_into_the_limit_of_memory(place: str) -> None:
    if place == "compose":
        limit = in_bytes(COMPOSE["mem_limit"])
        scratch = in_bytes(COMPOSE["tmpfs"][0].removeprefix("/tmp:size=").partition(",")[0])
    else:
        pod = pods()[place]
        limit = in_bytes(pod["containers"][0]["resources"]["limits"]["memory"])
        (scratch,) = [
            in_bytes(volume["emptyDir"]["sizeLimit"])
            for volume in pod["volumes"]
            if volume.get("emptyDir", {}).get("medium") == "Memory"
        ]
    # as docs/deploy.md says; what is in /tmp is memory too
    assert Settings.resolve({}, environments()[place]).max_total_body_bytes <= limit - 300_000_000 - scratch


@pytest.mark.parametrize("place", ["kubernetes", "kserve"])
def test_a_pod_can_do_nothing_but_serve(place: str) -> None:
    pod = pods()[place]
    (container,) = pod["containers"]
    security = {**pod.get("securityContext", {}), **container["securityContext"]}
    (user,) = re.findall(r"^USER (\d+):\1$", DOCKERFILE, re.MULTILINE)
    assert security.pop("fsGroup", int(user)) == int(user)
    assert security == {
        "runAsNonRoot": True,
        "runAsUser": int(user),
        "runAsGroup": int(user),
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    assert pod["automountServiceAccountToken"] is False
    assert {"cpu", "memory"} == set(container["resources"]["limits"])
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}


def test_compose_runs_the_server_as_unprivileged_as_kubernetes_does() -> None:
    (user,) = re.findall(r"^USER (\S+)$", DOCKERFILE, re.MULTILINE)
    for service in documents("compose.yaml")[0]["services"].values():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    assert COMPOSE["user"] == user


def test_every_description_runs_the_image_of_this_version() -> None:
    images = {COMPOSE["image"]} | {pod["containers"][0]["image"] for pod in pods().values()}
    assert images == {f"manygates:{manygates.__version__}"}


def test_compose_asks_for_health_as_the_image_does() -> None:
    (command,) = re.findall(r"^HEALTHCHECK .* CMD (\[.*\])$", DOCKERFILE, re.MULTILINE)
    assert COMPOSE["healthcheck"]["test"] == ["CMD", *json.loads(command)]


class Answers(BaseHTTPRequestHandler):
    """A server that answers every request with the status of its class."""

    status = 200

    def do_GET(self) -> None:
        self.send_response(self.status)
        self.end_headers()

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@contextmanager
def answering(status: int, context: ssl.SSLContext | None = None) -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), type("Answering", (Answers,), {"status": status}))
    if context is not None:
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http{'s' if context else ''}://127.0.0.1:{server.server_port}/v2/health/ready"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(scope="session")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], ssl.SSLContext]:
    """Return a function that makes the server's side of TLS, with a certificate that nobody trusts."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl, which makes a certificate, is not installed")
    folder = tmp_path_factory.mktemp("tls")
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    command += ["-keyout", "key.pem", "-out", "certificate.pem", "-days", "2", "-subj", "/CN=example.org"]
    subprocess.run(command, cwd=folder, capture_output=True, check=True)

    def make() -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(folder / "certificate.pem", folder / "key.pem")
        context.load_verify_locations(folder / "certificate.pem")
        return context

    return make


def test_the_health_check_agrees_with_the_server_about_ready_and_not_ready() -> None:
    with answering(200) as url:
        assert reason_against(url) is None
    with answering(503) as url:
        assert reason_against(url) == f"{url} answers 503"
    reason = reason_against(url)  # nobody listens there any more
    assert reason is not None
    assert "refused" in reason


def test_the_health_check_needs_no_trust_in_the_certificate_and_none_of_its_own(
    tls: Callable[[], ssl.SSLContext],
) -> None:
    with answering(200, tls()) as url:
        assert reason_against(url) is None
    with answering(503, tls()) as url:
        assert reason_against(url) == f"{url} answers 503"


def test_where_clients_need_certificates_the_health_check_is_content_with_a_connection() -> None:
    with answering(503) as url:
        place = url.replace("http:", "tcp:").removesuffix("/v2/health/ready")
        assert reason_against(place) is None
    reason = reason_against(place)
    assert reason is not None
    assert "refused" in reason


def test_a_health_check_ignores_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with answering(200) as url:
        assert reason_against(url) is None


@pytest.mark.parametrize(
    ("environment", "url"),
    [
        ({}, "http://127.0.0.1:8000"),
        ({"MANYGATES_SERVE_PORT": "9000"}, "http://127.0.0.1:9000"),
        ({"MANYGATES_SERVE_TLS_CERTIFICATE": "/c.pem"}, "https://127.0.0.1:8000"),
        ({"MANYGATES_SERVE_PORT": "tcp://10.0.0.1:80"}, "http://127.0.0.1:8000"),
        ({"MANYGATES_SERVE_TLS_CERTIFICATE": "/c.pem", "MANYGATES_SERVE_TLS_CLIENT_CA": "/ca.pem"}, "tcp"),
    ],
)
def test_the_health_check_asks_where_the_settings_say(environment: dict[str, str], url: str) -> None:
    assert address(environment) == ("tcp://127.0.0.1:8000" if url == "tcp" else f"{url}/v2/health/ready")


def test_the_health_check_costs_little_because_it_loads_nothing_of_the_server() -> None:
    code = "import sys, serving.health_check; print([m for m in sys.modules if m.split('.')[0] in {'numpy', 'zoo'}])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def tool(name: str) -> str:
    """Return the program of a checker beside this Python, or skip."""
    beside = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if beside is None:
        pytest.skip(f"{name} is not installed; it is in the dependency group `deploy`")
    return beside


def accepts(*command: str) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_hadolint_has_nothing_to_say_about_the_dockerfile() -> None:
    accepts(tool("hadolint"), "Dockerfile")


def test_the_compose_file_keeps_to_the_compose_specification() -> None:
    accepts(tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", "compose.yaml")
    accepts(tool("compose-lint"), "compose.yaml")


@pytest.mark.skipif(find_spec("kubernetes_validate") is None, reason="needs the dependency group `deploy`")
@pytest.mark.parametrize("place", ["kubernetes", "kserve"])
def test_kubernetes_schemas_accept_every_document(place: str) -> None:
    from kubernetes_validate import validate

    checked = [document for document in documents(f"deploy/{place}.yaml") if "kserve" not in document["apiVersion"]]
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "manygates"}, "spec": pods()[place]}
    for document in [*checked, pod]:
        validate(document, "1.37", strict=True)
