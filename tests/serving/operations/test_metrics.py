"""What `/metrics` tells, read as Prometheus reads it."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from serving.answers import Plan, Prediction, Predictor
from serving.http.app import Application
from serving.operations.metrics import Metrics, ModelMetrics
from serving.operations.settings import Settings
from serving.scheduling.service import Model

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def read(text: str | bytes) -> Samples:
    """Return every sample by its name and labels; each may be there only once, and under its family's name."""
    found: Samples = {}
    for family in text_string_to_metric_families(text.decode() if isinstance(text, bytes) else text):
        assert family.documentation
        for sample in family.samples:
            assert sample.name.startswith(family.name)
            key = sample.name, tuple(sorted(sample.labels.items()))
            assert key not in found
            found[key] = sample.value
    return found


def value(samples: Samples, name: str, **labels: str) -> float | None:
    return samples.get((name, tuple(sorted(labels.items()))))


def metrics_of(model: str = "tiny", version: str = "1", **changes: Any) -> ModelMetrics:
    fields: dict[str, Any] = {"plan": Plan("single"), "waiting": lambda: 3, "ready": lambda: True, **changes}
    return ModelMetrics(model, version, **fields)


def prediction(rows: int, **fields: Any) -> Prediction:
    return Prediction(np.zeros((rows, 3), np.float32), np.zeros((rows, 3), np.float32), **fields)


def test_every_histogram_has_monotone_buckets_of_which_the_last_is_its_count() -> None:
    metrics = Metrics()
    first, second = metrics_of(), metrics_of("other", "2", plan=Plan("random", 4))
    rng = np.random.default_rng(0)
    for model in (first, second):
        metrics.add(model)
        for _ in range(100):
            model.answered("infer", None, rng.exponential(0.01))
            model.request_started(rng.exponential(0.001))
            model.batch_finished(prediction(rng.integers(1, 200)), rng.exponential(0.005), None)
    samples = read(metrics.text())
    histograms: dict[tuple[str, Any], list[tuple[float, float]]] = {}
    for (name, labels), count in samples.items():
        if name.endswith("_bucket"):
            others = tuple(label for label in labels if label[0] != "le")
            bound = float(dict(labels)["le"])
            histograms.setdefault((name.removesuffix("_bucket"), others), []).append((bound, count))
    assert {name for name, _ in histograms} == {
        f"manygates_{name}" for name in ("request_seconds", "queue_seconds", "compute_seconds", "batch_images")
    }
    assert len(histograms) == 8
    for (name, labels), buckets in histograms.items():
        counts = [count for _, count in sorted(buckets)]
        assert counts == sorted(counts)
        assert sorted(buckets)[-1] == (np.inf, 100)
        assert value(samples, f"{name}_count", **dict(labels)) == 100
        total = value(samples, f"{name}_sum", **dict(labels))
        assert total is not None
        assert total > 0


def test_counts_are_kept_by_model_version_endpoint_and_mode() -> None:
    metrics = Metrics()
    models = [metrics_of(), metrics_of(version="2"), metrics_of("other", plan=Plan("random", 2))]
    for times, model in enumerate(models, 1):
        metrics.add(model)
        for _ in range(times):
            model.answered("infer", None, 0.1)
            model.batch_finished(prediction(4), 0.1, None)
        model.answered("classify", Plan("ensemble"), 0.1)
        model.batch_finished(prediction(1), 0.1, Plan("ensemble"))
    samples = read(metrics.text())
    for times, (model, version, mode) in enumerate(
        (("tiny", "1", "single"), ("tiny", "2", "single"), ("other", "1", "random")), 1
    ):
        labels = {"model": model, "version": version}
        assert value(samples, "manygates_requests_total", endpoint="infer", mode=mode, **labels) == times
        assert value(samples, "manygates_requests_total", endpoint="classify", mode="ensemble", **labels) == 1
        assert value(samples, "manygates_images_total", mode=mode, **labels) == 4 * times
        assert value(samples, "manygates_images_total", mode="ensemble", **labels) == 1
        assert value(samples, "manygates_request_seconds_count", **labels) == times + 1
        assert value(samples, "manygates_batch_images_sum", mode=mode, **labels) == 4 * times
        assert value(samples, "manygates_queue_images", **labels) == 3
        assert value(samples, "manygates_model_ready", **labels) == 1
    assert value(samples, "manygates_path_draws_total", model="other", version="1") == 3 * 4 * 2
    assert value(samples, "manygates_path_draws_total", model="tiny", version="1") is None


@pytest.mark.parametrize(("shared", "draws"), [(False, 3 * 5 * 2), (True, 3 * 2)])
def test_draws_are_counted_per_image_or_per_batch(shared: bool, draws: int) -> None:
    metrics, model = Metrics(), metrics_of(plan=Plan("random", 3), shared_gates=shared)
    metrics.add(model)
    for _ in range(2):
        model.batch_finished(prediction(5), 0.1, None)
        model.batch_finished(prediction(5), 0.1, Plan("single"))
    assert value(read(metrics.text()), "manygates_path_draws_total", model="tiny", version="1") == draws


def test_a_model_that_takes_anothers_place_goes_on_with_its_counts_and_so_does_what_the_other_still_answers() -> None:
    metrics = Metrics()
    fields = {"plan": Plan("random", 2), "num_exits": 2}
    old, other, new = metrics_of(**fields), metrics_of(version="2", **fields), metrics_of(**fields)

    def answer(model: ModelMetrics) -> None:
        model.answered("infer", None, 0.1)
        model.request_started(0.1)
        model.batch_finished(prediction(1, exits=np.array([1])), 0.1, None)

    def counted() -> Samples:
        samples = read(metrics.text())
        # the first version is blamed where nothing tells which it was
        own = {key: v for key, v in samples.items() if ("version", "1") in key[1]}
        return {key: v for key, v in own.items() if key[0].endswith(("_total", "_count"))}

    metrics.add(old)
    metrics.add(other)
    answer(old)
    metrics.failed("tiny", "bad_request")
    once = counted()
    assert len(once) == 9
    assert set(once.values()) == {0, 1, 2}
    metrics.add(new)
    assert counted() == once
    answer(old)
    answer(new)
    assert counted() == {key: 3 * count for key, count in once.items()}
    assert new.statistics()["inference_stats"]["fail"]["count"] == 1  # type: ignore[index]
    metrics.remove(new)
    assert counted() == {}


def test_what_is_told_of_a_model_names_how_it_is_served() -> None:
    metrics = Metrics()
    metrics.add(metrics_of(info={"precision": "int8", "provider": "CPUExecutionProvider", "modes": "single random"}))
    samples = read(metrics.text())
    labels = {"mode": "single", "modes": "single random", "precision": "int8", "provider": "CPUExecutionProvider"}
    assert value(samples, "manygates_model_info", model="tiny", version="1", gated="", **labels) == 1


@pytest.mark.parametrize("name", ['a"b', "a\\b", "a\nb", "ä"])
def test_labels_of_any_text_are_read_back_as_they_were(name: str) -> None:
    metrics = Metrics()
    metrics.add(metrics_of(name))
    metrics.failed(name, "bad_request")
    metrics.loaded(name, "failed")
    samples = read(metrics.text())
    assert value(samples, "manygates_queue_images", model=name, version="1") == 3
    assert value(samples, "manygates_request_failures_total", model=name, reason="bad_request") == 1
    assert value(samples, "manygates_model_loads_total", model=name, outcome="failed") == 1


def test_the_servers_metrics_are_read_by_prometheus_and_fit_its_statistics(
    tiny_application: Callable[..., Application],
) -> None:
    def document(rows: int, **parameters: Any) -> str:
        tensor = {"name": "images", "shape": [rows, 3, 4, 4], "datatype": "FP32", "data": [0.5] * 48 * rows}
        return json.dumps({"inputs": [tensor], "parameters": parameters})

    async def main() -> None:
        application = tiny_application("random", draws=3, allow_mode_choice=True)
        transport = httpx.ASGITransport(application)
        async with application.running(), httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            for rows, parameters in ((1, {}), (2, {"draws": 5}), (4, {"mode": "single"}), (8, {"mode": "ensemble"})):
                answer = await client.post("/v2/models/tiny/infer", content=document(rows, **parameters))
                assert answer.status_code == 200
            assert (await client.post("/v2/models/tiny/infer", content=b"{")).status_code == 400
            response = await client.get("/metrics")
            [statistics] = (await client.get("/v2/models/tiny/stats")).json()["model_stats"]
        assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        samples = read(response.text)
        labels = {"model": "tiny", "version": "1"}
        images = {
            mode: value(samples, "manygates_images_total", mode=mode, **labels)
            for mode in ("random", "single", "ensemble")
        }
        assert images == {"random": 3, "single": 4, "ensemble": 8}
        assert value(samples, "manygates_path_draws_total", **labels) == 1 * 3 + 2 * 5
        assert value(samples, "process_open_fds") is not None
        assert statistics["inference_count"] == 15
        assert statistics["inference_stats"]["success"]["count"] == 4
        assert statistics["inference_stats"]["fail"]["count"] == 1
        assert statistics["execution_count"] == statistics["inference_stats"]["compute_infer"]["count"] >= 4
        in_seconds = value(samples, "manygates_request_seconds_sum", **labels)
        assert statistics["inference_stats"]["success"]["ns"] == pytest.approx(1e9 * in_seconds, abs=1)

    asyncio.run(main())


def test_a_model_is_ready_while_it_takes_requests(card: Any) -> None:
    class Fixed(Predictor):
        def predict(self, images: np.ndarray, *_: Any, **__: Any) -> Prediction:
            return prediction(len(images))

    application = Application([Model(card=card, mode="single", predictor=Fixed())], Settings(threads=1))

    def ready() -> float | None:
        return value(read(application.metrics.text()), "manygates_model_ready", model="tiny", version="1")

    async def main() -> None:
        assert ready() == 0
        async with application.running():
            assert ready() == 1
            application.service.begin_drain()
            assert ready() == 0
        assert ready() == 0

    asyncio.run(main())
