"""The core that every protocol shares: models, versions, failures, start and stop."""

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from serving.answers import Plan, Prediction, Predictor
from serving.errors import GRPC_CODES, RequestError
from serving.operations.settings import Settings
from serving.protocol.choices import Asked
from serving.scheduling.queue import Outcome
from serving.scheduling.service import Model, Service
from zoo.bundle.card import Card
from zoo.errors import BadInput


class Fixed(Predictor):
    """Answers every image with its number, and remembers what it was told."""

    modes = ("single", "random")

    def __init__(self, number: float = 0.0) -> None:
        self.number = number
        self.plans: list[Plan | None] = []

    def predict(self, images: np.ndarray, *_: Any, plan: Plan | None = None, **__: Any) -> Prediction:
        self.plans.append(plan)
        return Prediction(np.full((len(images), 3), self.number, np.float32), np.zeros((len(images), 3), np.float32))


class Gate(Fixed):
    def __init__(self) -> None:
        super().__init__()
        self.entered, self.opened = threading.Event(), threading.Event()

    def predict(self, images: np.ndarray, *_: Any, plan: Plan | None = None, **__: Any) -> Prediction:
        self.entered.set()
        assert self.opened.wait(10)
        return super().predict(images, plan)


class Broken(Fixed):
    def predict(self, images: np.ndarray, *_: Any, plan: Plan | None = None, **__: Any) -> Prediction:
        raise RuntimeError("secret detail")


IMAGE = np.zeros((1, 3, 4, 4), np.float32)


@pytest.fixture
def model(card: Card) -> Callable[..., Model]:
    def build(predictor: Any = None, *, name: str = "tiny", **fields: Any) -> Model:
        answers: Any = predictor or Fixed()
        return Model(**{"card": replace(card, name=name), "mode": "single", "predictor": answers, **fields})

    return build


def run(service: Service, body: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        service.start()
        try:
            async with asyncio.timeout(20):
                await body()
        finally:
            await service.stop()

    asyncio.run(main())


def number_of(answer: Prediction) -> float:
    return float(answer.probabilities[0, 0])


def test_the_first_model_is_the_default_and_the_latest_version_is_a_models(model) -> None:
    versions = ("2", "10", "1", "old")
    models = [model(name="first")] + [model(Fixed(number), version=v) for number, v in enumerate(versions)]
    service = Service(models, Settings(threads=1))
    assert service.names == ["first", "tiny"]
    assert service.find(None).name == "first"
    assert service.find("tiny").version == "10"
    assert service.find("tiny", "").version == "10"
    for version in versions:
        assert service.find("tiny", version).version == version
    assert service.versions("tiny") == ["old", "1", "2", "10"]
    assert [served.version for served in service.everything()] == ["1", "old", "1", "2", "10"]


@pytest.mark.parametrize(
    ("name", "version", "reason", "said"),
    [
        ("tinny", None, "unknown_model", "unknown model 'tinny'; did you mean 'tiny'?"),
        ("", None, "unknown_model", "unknown model ''"),
        ("../tiny", None, "unknown_model", "unknown model '../tiny'"),
        ("x" * 5000, None, "unknown_model", "known: tiny"),
        ("tiny", "2", "unknown_version", "tiny has no version '2', only '1'"),
        ("tiny", "9" * 5000, "unknown_version", "only '1'"),
        ("tiny", "../1", "unknown_version", "only '1'"),
    ],
)
def test_what_is_not_served_is_answered_with_404_and_the_known_ones(model, name, version, reason: str, said) -> None:
    service = Service([model()], Settings(threads=1))
    with pytest.raises(RequestError) as refusal:
        service.find(name, version)
    assert (refusal.value.status, refusal.value.reason) == (404, reason)
    assert refusal.value.grpc_code == "NOT_FOUND"
    assert said in str(refusal.value)
    assert len(str(refusal.value)) < 400


def test_nothing_is_the_default_of_a_service_without_models() -> None:
    with pytest.raises(RequestError, match="none is known here"):
        Service([], Settings(threads=1, model_repository="x")).find(None)


def test_a_model_and_version_is_served_once(model) -> None:
    with pytest.raises(BadInput, match="'tiny' is to be served twice; name each model once"):
        Service([model(), model(version="2"), model()], Settings(threads=1))


def test_the_generation_grows_with_every_change_of_what_is_served(model) -> None:
    service = Service([model()], Settings(threads=1))
    seen = [service.generation]

    async def body() -> None:
        for change in (
            lambda: service.put(model()),
            lambda: service.put(model(name="other")),
            lambda: service.drop("other"),
            lambda: service.put(model(version="2")),
            lambda: service.drop("tiny", "2"),
            lambda: service.drop("tiny"),
        ):
            change()
            seen.append(service.generation)
        with pytest.raises(RequestError, match="unknown model 'tiny'"):
            service.drop("tiny")
        seen.append(service.generation)

    run(service, body)
    assert seen[:-1] == sorted(set(seen[:-1]))
    assert seen[-1] == seen[-2]


def test_a_plan_a_deadline_and_bulk_reach_the_queue(model) -> None:
    fixed = Fixed()
    service = Service([model(fixed, modes=("single", "random"))], Settings(threads=1))

    async def body() -> None:
        served = service.find("tiny")
        await service.predict(served, IMAGE)
        await service.predict(served, IMAGE, Asked(plan=Plan("random", 3), timeout=10, bulk=True))
        outcomes: list[Outcome] = []
        service.enter(served, IMAGE, Asked(plan=Plan("random", 2)), outcomes.append)
        while not outcomes:
            await asyncio.sleep(0.001)
        assert isinstance(outcomes[0], Prediction)

    run(service, body)
    assert fixed.plans == [None, Plan("random", 3), Plan("random", 2)]


def test_every_failure_has_its_status_in_each_protocol(model, caplog: pytest.LogCaptureFixture) -> None:
    gate = Gate()
    settings = Settings(threads=1, max_batch=1, max_queue=2, queue_timeout=0.2, drain_timeout=0)
    service = Service([model(gate), model(Broken(), name="broken")], settings)
    found: dict[str, RequestError] = {}

    async def fails(name: str, *, asked: Asked | None = None) -> None:
        with pytest.raises(RequestError) as failure:
            await service.predict(service.find(name), IMAGE, asked or Asked())
        found[failure.value.reason] = failure.value

    async def body() -> None:
        tasks = [asyncio.create_task(service.predict(service.find("tiny"), IMAGE)) for _ in range(2)]
        while not gate.entered.is_set():
            await asyncio.sleep(0.001)
        await fails("tiny", asked=Asked(timeout=0.01))
        await fails("tiny")  # no turn in time
        waiting = [asyncio.create_task(fails("tiny")) for _ in range(2)]
        await asyncio.sleep(0)
        await fails("tiny")  # no place
        await asyncio.gather(*waiting)
        gate.opened.set()
        await asyncio.gather(*tasks)
        await fails("broken")

    run(service, body)
    asyncio.run(fails("tiny"))
    found["defect"] = service.failure(service.everything()[0], KeyError("secret detail"))
    statuses = {reason: (error.status, error.grpc_code, bool(error.headers)) for reason, error in found.items()}
    assert statuses == {
        "queue_full": (429, "RESOURCE_EXHAUSTED", True),
        "queue_timeout": (503, "UNAVAILABLE", True),
        "deadline": (504, "DEADLINE_EXCEEDED", False),
        "model_failed": (500, "INTERNAL", False),
        "not_ready": (503, "UNAVAILABLE", True),
        "defect": (500, "INTERNAL", False),
    }
    for error in found.values():
        assert "secret" not in str(error)
        assert error.headers in ([], [(b"retry-after", b"1")])
    assert caplog.text.count("secret detail") >= 2, "the log says more"


def test_a_request_error_is_what_it_is(model) -> None:
    service = Service([model()], Settings(threads=1))
    error = RequestError(413, "too_many_images", "split it")
    assert service.failure(service.find("tiny"), error) is error
    assert error.grpc_code == "INVALID_ARGUMENT"
    assert RequestError(418, "teapot", "").grpc_code == "UNKNOWN"
    assert set(GRPC_CODES) >= {400, 401, 403, 404, 408, 413, 415, 429, 500, 503, 504}


def test_a_model_that_was_replaced_or_dropped_is_let_go_of_whoever_remembers_it(model) -> None:
    async def main() -> None:
        service = Service([model(Fixed(0))], Settings(threads=1))
        service.start()
        remembered, engines = [], []
        for number in range(1, 4):
            remembered.append(service.find("tiny"))
            engines.append(weakref.ref(remembered[-1].model.predictor))
            await service.predict(remembered[-1], IMAGE)
            service.put(model(Fixed(number)))
        assert {old.latest for old in remembered} == {service.find("tiny")}
        remembered.append(service.find("tiny"))
        engines.append(weakref.ref(remembered[-1].model.predictor))
        service.drop("tiny")
        while service._closing:
            await asyncio.sleep(0.001)
        await service.stop()
        gc.collect()
        assert [engine() for engine in engines] == [None] * 4

    asyncio.run(main())


def test_the_time_to_drain_is_one_for_all_and_over_when_nobody_wants_to_wait(model) -> None:
    async def main() -> None:
        gate = Gate()
        service = Service([model(gate)], Settings(threads=1, drain_timeout=30))
        service.start()
        assert service.time_to_drain == 30
        waiting = asyncio.create_task(service.predict(service.find("tiny"), IMAGE))
        while not gate.entered.is_set():
            await asyncio.sleep(0.001)
        service.close_by(time.monotonic() + 20)
        assert service.closing
        assert not service.ready
        assert 19 < service.time_to_drain <= 20
        stopping = asyncio.create_task(service.stop())
        await asyncio.sleep(0.02)
        assert not stopping.done()
        service.hurry()
        assert service.time_to_drain == 0
        with pytest.raises(RequestError, match="the server is starting or stopping"):
            await waiting
        gate.opened.set()
        await asyncio.wait_for(stopping, 5)
        assert not service.scheduler.stuck

    asyncio.run(main())


def test_whoever_waits_for_a_model_that_was_replaced_is_told_as_soon_as_the_others(model) -> None:
    async def main() -> None:
        gate = Gate()
        service = Service([model(gate)], Settings(threads=1, drain_timeout=30))
        service.start()
        waiting = asyncio.create_task(service.predict(service.find("tiny"), IMAGE))
        while not gate.entered.is_set():
            await asyncio.sleep(0.001)
        service.put(model(Fixed(1)))
        service.hurry()
        with pytest.raises(RequestError, match="the server is starting or stopping"):
            await asyncio.wait_for(waiting, 5)
        gate.opened.set()
        await asyncio.wait_for(service.stop(), 5)

    asyncio.run(main())


def test_readiness_is_of_every_model_and_goes_when_the_drain_begins(model) -> None:
    service = Service([model(), model(name="other")], Settings(threads=1))
    assert not service.ready

    async def body() -> None:
        assert service.ready
        await service.scheduler.close(service.find("other").queue, 0)
        assert not service.ready
        service.put(model(name="other"))
        assert service.ready
        service.begin_drain()
        assert not service.ready
        assert service.draining
        assert number_of(await service.predict(service.find("tiny"), IMAGE)) == 0  # still answered

    run(service, body)
    assert not service.ready


def test_a_model_is_replaced_under_load_without_a_failure_and_each_answer_is_of_one_of_the_two(model) -> None:
    service = Service([model(Fixed(0))], Settings(threads=2, max_queue=10_000))
    numbers: list[float] = []

    async def body() -> None:
        async def client(count: int) -> None:
            for _ in range(count):
                numbers.append(number_of(await service.predict(service.find("tiny"), IMAGE)))

        clients = [asyncio.create_task(client(150)) for _ in range(8)]
        for number in range(1, 20):
            await asyncio.sleep(0.005)
            service.put(model(Fixed(number)))
            assert number_of(await service.predict(service.find("tiny"), IMAGE)) == number
        await asyncio.gather(*clients)

    run(service, body)
    assert len(numbers) == 8 * 150
    assert set(numbers) <= set(range(20))
    assert service.scheduler.queues == []


def test_stopping_answers_what_was_taken_also_by_models_that_were_replaced_or_dropped(model) -> None:
    gate = Gate()
    service = Service([model(gate), model(Fixed(1), name="other")], Settings(threads=1, max_batch=1))
    tasks: list[asyncio.Task[Prediction]] = []

    async def body() -> None:
        tasks.extend(asyncio.create_task(service.predict(service.find("tiny"), IMAGE)) for _ in range(3))
        tasks.extend(asyncio.create_task(service.predict(service.find("other"), IMAGE)) for _ in range(3))
        while not gate.entered.is_set():
            await asyncio.sleep(0.001)
        service.put(model(Fixed(2)))
        service.drop("other")
        tasks.extend(asyncio.create_task(service.predict(service.find("tiny"), IMAGE)) for _ in range(3))
        await asyncio.sleep(0)
        asyncio.get_running_loop().call_later(0.05, gate.opened.set)

    run(service, body)
    assert [number_of(task.result()) for task in tasks] == [0] * 3 + [1] * 3 + [2] * 3
    assert not any(thread.name.startswith("predict-") for thread in threading.enumerate())


def test_the_configuration_tells_how_a_model_is_batched_and_run(model) -> None:
    served = Service([model(details=(("precision", "int8"),))], Settings(threads=1, max_batch=4)).find("tiny")
    configuration = served.configuration()
    assert configuration["name"] == "tiny"
    assert configuration["max_batch_size"] == 4
    assert configuration["input"] == [{"name": "images", "data_type": "TYPE_FP32", "dims": [3, 4, 4]}]
    assert [output["dims"] for output in configuration["output"]] == [[3], [3]]
    assert configuration["parameters"]["precision"] == {"string_value": "int8"}
