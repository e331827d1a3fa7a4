"""The OpenAPI document says what the server does, and the server does what it says."""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import numpy as np
import openapi_spec_validator
import pytest
from starlette.routing import Route

from serving.answers import Prediction, Predictor
from serving.http import openapi
from serving.http.app import Application
from serving.operations.settings import Settings
from serving.protocol.open_inference import HEADER_LENGTH
from serving.scheduling.service import Model
from serving.server import build
from zoo.bundle.card import Exit, Paths

KEY = "alice-alice-alice-1"
STATUSES = {"400", "401", "403", "404", "408", "413", "415", "429", "431", "500", "503", "504"}
OPERATIONS = 20


class Fixed(Predictor):
    def predict(self, images: np.ndarray, *_: Any, **__: Any) -> Prediction:
        row = np.array([[0.125, 0.625, 0.25]], dtype=np.float32)
        return Prediction(np.repeat(row, len(images), axis=0), np.zeros((len(images), 3), np.float32))


def document_of(application: Application) -> dict[str, Any]:
    return openapi.document(application.service, application.starlette.routes)


def choices(operation: dict[str, Any]) -> dict[str, Any]:
    """Return the schemas of the parameters of an operation."""
    return {parameter["name"]: parameter["schema"] for parameter in operation["parameters"]}


def operations(document: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {
        (path, method): operation
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }


def fits(document: dict[str, Any], schema: str, value: Any) -> None:
    """Fail unless a value is as a schema of the document says."""
    whole = {"$ref": f"#/components/schemas/{schema}", "components": document["components"]}
    jsonschema.Draft202012Validator(whole).validate(value)


def ask(application: Application, body: Callable[[httpx.AsyncClient], Awaitable[None]]) -> None:
    async def main() -> None:
        transport = httpx.ASGITransport(application)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client, application.running():
            await body(client)

    asyncio.run(main())


@pytest.fixture(scope="module")
def keys_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text(f"alice:{KEY}\n")
    file.chmod(0o600)
    return str(file)


@pytest.fixture(scope="module")
def several(make_card) -> Callable[[], Application]:
    """Return a function to an application of several models, which a test may change."""
    card = make_card()
    large = replace(card, name="large", input=replace(card.input, height=40, width=40))
    plain = replace(card.architecture, gated_layers=(), candidates=1, sharing=None)
    early = replace(
        card,
        name="early",
        architecture=plain,
        paths=Paths(single=None, ensemble=()),
        variants=("single",),
        exits=(Exit(macs=1), Exit(macs=2), Exit(macs=3)),
    )
    models = [
        Model(card=card, mode="single", predictor=Fixed(), modes=("single", "random"), draws=100),
        Model(card=large, mode="ensemble", predictor=Fixed(), voting=("ensemble",), version="7"),
        Model(card=early, mode="single", predictor=Fixed(), limits=np.zeros(2, np.float32)),
    ]
    return lambda: Application(models, Settings(threads=1))


@pytest.fixture(scope="module")
def applications(
    shared_application, several, keys_file: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Application]:
    """Servers of every kind."""
    empty = tmp_path_factory.mktemp("empty")
    return {
        "plain": shared_application("single"),
        "any mode": shared_application("random", allow_mode_choice=True, allow_repository_changes=True),
        "several": several(),
        "nothing yet": build(Settings(threads=1, model_repository=str(empty))),
        "keys": shared_application("single", api_keys_file=keys_file),
        "administrators": shared_application("single", admin_keys_file=keys_file),
    }


KINDS = pytest.mark.parametrize("kind", ["plain", "any mode", "several", "nothing yet", "keys", "administrators"])


@KINDS
def test_the_document_is_valid_openapi_and_served_as_json(applications, kind: str) -> None:
    application = applications[kind]

    async def body(client: httpx.AsyncClient) -> None:
        answer = await client.get("/openapi.json", headers={"x-api-key": KEY})
        assert answer.status_code == 200
        assert answer.headers["content-type"] == "application/json"
        assert answer.json() == document_of(application)
        assert "GET /openapi.json" in (await client.get("/", headers={"x-api-key": KEY})).json()["endpoints"]

    ask(application, body)
    openapi_spec_validator.validate(document_of(application))


@KINDS
def test_every_route_is_in_the_document_and_the_other_way_round(applications, kind: str) -> None:
    application = applications[kind]
    routes = {
        (route.path, method.lower())
        for route in application.starlette.routes
        if isinstance(route, Route)
        for method in route.methods or ()
        if method != "HEAD"  # Starlette's own addition to GET
    }
    found = operations(document_of(application))
    assert found.keys() == routes
    assert len(routes) == OPERATIONS
    names = [operation["operationId"] for operation in found.values()]
    assert len({*names}) == len(names)


def test_every_error_of_the_documentation_is_in_the_document() -> None:
    page = (Path(__file__).parents[3] / "docs/serving.md").read_text()
    table = page.partition("### Errors")[2].partition("\n## ")[0]
    told = {line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| ")} - {"status"}
    assert told - {"405"} == STATUSES == {str(status) for status in openapi.STATUSES}


def test_names_shapes_and_choices_are_those_of_the_served_models(applications) -> None:
    document = document_of(applications["several"])
    schemas = document["components"]["schemas"]
    path = choices(document["paths"]["/v2/models/{model}/versions/{version}/infer"]["post"])
    assert path["model"]["enum"] == ["tiny", "large", "early"]
    assert path["version"]["enum"] == ["1", "7"]
    for found in (choices(document["paths"]["/classify"]["post"]), schemas["InferParameters"]["properties"]):
        assert found["mode"]["enum"] == ["random", "single"]
        assert found["draws"]["maximum"] == 100
        assert found["exit"]["maximum"] == 3
        assert "confidence" in found
    shapes = [
        tuple(entry["const"] for entry in tensor["properties"]["shape"]["prefixItems"][1:])
        for tensor in schemas["InferRequest"]["properties"]["inputs"]["items"]["oneOf"]
    ]
    assert shapes == [(3, 4, 4)] * 2 + [(3, 40, 40)] * 2
    assert {*schemas["WantedOutput"]["properties"]["name"]["enum"]} == {
        "probabilities",
        "logits",
        "exit",
        "agreement",
    }


def test_what_requests_may_not_choose_is_not_in_the_document(applications) -> None:
    document = document_of(applications["plain"])
    schemas = document["components"]["schemas"]
    for found in (choices(document["paths"]["/classify"]["post"]), schemas["InferParameters"]["properties"]):
        assert not {"mode", "draws", "exit", "confidence"} & found.keys()
    assert schemas["WantedOutput"]["properties"]["name"]["enum"] == ["probabilities", "logits"]


def test_the_document_changes_with_what_is_served(several) -> None:
    application = several()

    async def body(client: httpx.AsyncClient) -> None:
        async def names() -> list[str]:
            document = (await client.get("/openapi.json")).json()
            return choices(document["paths"]["/v2/models/{model}"]["get"])["model"]["enum"]

        assert await names() == ["tiny", "large", "early"]
        application.service.drop("large")
        assert await names() == ["tiny", "early"]

    ask(application, body)


@pytest.mark.parametrize(
    ("kind", "free"),
    [("plain", None), ("keys", {"/v2/health/live", "/v2/health/ready"}), ("administrators", None)],
)
def test_the_document_says_where_a_key_is_needed(applications, kind: str, free: Any) -> None:
    document = document_of(applications[kind])
    needy = {path for (path, _), operation in operations(document).items() if "security" in operation}
    changes = {f"/v2/repository/models/{{model}}/{verb}" for verb in ("load", "unload")}
    everything = {*document["paths"]}
    assert needy == {"plain": set(), "keys": everything - (free or set()), "administrators": changes}[kind]
    assert ("securitySchemes" in document["components"]) == (kind != "plain")
    for (path, _), operation in operations(document).items():
        assert ("401" in operation["responses"]) == (path in needy)


def test_where_the_document_asks_for_no_key_none_is_needed_and_elsewhere_it_is(applications) -> None:
    application = applications["keys"]
    found = operations(document_of(application))

    async def body(client: httpx.AsyncClient) -> None:
        for (path, method), operation in found.items():
            address = path.format(model="tiny", version="1")
            assert ((await client.request(method, address)).status_code == 401) == ("security" in operation)

    ask(application, body)


def test_the_examples_are_answered_and_the_answers_are_as_the_document_says(applications) -> None:
    application = applications["any mode"]
    document = document_of(application)
    components = document["components"]
    in_json = components["examples"]["InferRequest"]["value"]
    fits(document, "InferRequest", in_json)
    (head,) = components["schemas"]["BinaryInferRequestHead"]["examples"]
    fits(document, "BinaryInferRequestHead", head)
    fits(document, "InferResponse", components["schemas"]["InferResponse"]["examples"][0])
    classified = document["paths"]["/classify"]["post"]["responses"]["200"]["content"]["application/json"]
    for example in classified["examples"].values():
        fits(document, "Classification", example["value"])

    async def body(client: httpx.AsyncClient) -> None:
        answer = await client.post("/v2/models/tiny/infer", json=in_json)
        assert answer.status_code == 200
        fits(document, "InferResponse", answer.json())
        text, name = json.dumps(head).encode(), HEADER_LENGTH.decode()
        tensor = bytes(head["inputs"][0]["parameters"]["binary_data_size"])
        answer = await client.post("/v2/models/tiny/infer", content=text + tensor, headers={name: str(len(text))})
        assert answer.status_code == 200
        told = json.loads(answer.content[: int(answer.headers[name])])
        fits(document, "BinaryInferResponseHead", told)
        assert len(answer.content) == int(answer.headers[name]) + sum(
            output["parameters"]["binary_data_size"] for output in told["outputs"]
        )
        for path, schema in (
            ("/", "Index"),
            ("/v2", "ServerMetadata"),
            ("/v2/models/tiny", "ModelMetadata"),
            ("/v2/models/tiny/versions/1/config", "ModelConfiguration"),
            ("/v2/models/tiny/stats", "Statistics"),
        ):
            fits(document, schema, (await client.get(path)).json())

    ask(application, body)


def test_a_model_of_large_images_has_no_example_of_thousands_of_numbers(card) -> None:
    large = replace(card, input=replace(card.input, height=400, width=400))
    application = Application([Model(card=large, mode="single", predictor=Fixed())], Settings(threads=1))
    document = document_of(application)
    openapi_spec_validator.validate(document)
    assert "examples" not in document["components"]
    assert len(json.dumps(document)) < 50_000


@pytest.mark.slow
@pytest.mark.parametrize("way", ["open", "keys"])
def test_schemathesis_finds_no_5xx_and_no_answer_that_the_document_does_not_allow(
    shared_application, keys_file: str, serve_in_a_thread, tmp_path: Path, way: str
) -> None:
    settings: dict[str, Any] = {"allow_mode_choice": True, "max_queue": 64}
    more = []
    if way == "keys":
        settings |= {"api_keys_file": keys_file, "log_requests": True, "cors_origins": ("*",)}  # without the short way
        more = ["--header", f"X-API-Key: {KEY}"]
    # a request may ask for no more than a few microseconds
    (tmp_path / "schemathesis.toml").write_text(
        '[checks.not_a_server_error]\nexpected-statuses = ["2xx", "3xx", "4xx", "504"]\n'
    )
    with serve_in_a_thread(shared_application("random", **settings)) as url:
        done = subprocess.run(
            [
                *(sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json", *more),
                # what JSON Schema cannot say is refused all the same: sizes that go with shapes, draws with modes
                # and one good key is enough, whatever comes beside it
                *("--exclude-checks", "positive_data_acceptance,ignored_auth"),
                *("--phases", "examples,coverage,fuzzing", "--max-examples", "15", "--seed", "1"),
                *("--generation-deterministic", "--request-timeout", "10", "--no-color"),
            ],
            cwd=tmp_path,
            env={**os.environ, "PYTHONWARNINGS": "default"},
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"Tested: {OPERATIONS - 1}" in done.stdout  # it leaves out the document itself
