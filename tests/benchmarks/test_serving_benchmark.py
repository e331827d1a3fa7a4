"""What the serving benchmark makes of what it reads: wrk's report, an answer's bytes, a run's numbers."""

import importlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
GOOD = {
    "requests": 1000, "microseconds": 500_000, "bytes": 300_000, "p50": 250, "p90": 400, "p99": 2000, "worst": 3000,
    "connect": 0, "read": 0, "write": 0, "status": 0, "timeout": 0,
}  # fmt: skip


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Import modules of the folder of benchmarks, which is no package, and forget them afterwards."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    names = ("machine", "wrk", "servers", "serving_report")
    before = {name: sys.modules.pop(name, None) for name in names}

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    yield load
    for name in names:
        sys.modules.pop(name, None)
        if (module := before[name]) is not None:
            sys.modules[name] = module


def printed(**changes: int) -> str:
    return "Running 1s test\n  1 threads\n\nRESULT " + json.dumps(GOOD | changes) + "\n"


def test_rates_and_latencies_come_from_the_line_of_the_script(scripts: Any) -> None:
    report = scripts("wrk").read_report(printed())
    assert report["per_second"] == 2000
    assert (report["p50_ms"], report["p99_ms"], report["bytes_each"]) == (0.25, 2.0, 300)


@pytest.mark.parametrize("kind", ["connect", "read", "write", "status", "timeout"])
def test_a_single_failed_request_spoils_a_measurement(scripts: Any, kind: str) -> None:
    wrk = scripts("wrk")
    with pytest.raises(wrk.RequestError, match=kind):
        wrk.read_report(printed(**{kind: 1}))


@pytest.mark.parametrize("text", ["", "Requests/sec: 5", printed(requests=0, microseconds=1)])
def test_no_requests_are_no_measurement(scripts: Any, text: str) -> None:
    wrk = scripts("wrk")
    with pytest.raises(wrk.RequestError):
        wrk.read_report(text)


def test_the_script_holds_no_mark_that_was_not_replaced(scripts: Any) -> None:
    script = scripts("wrk").lua("/folder", 16, {"Inference-Header-Content-Length": "71"})
    assert "@" not in script
    assert "for number = 1, 16 do" in script
    assert '{["Inference-Header-Content-Length"] = "71"}' in script


def test_requests_are_the_json_they_announce_and_an_image_each(scripts: Any) -> None:
    images = np.arange(2 * 3 * 32 * 32, dtype=np.uint8).reshape(2, 3, 32, 32)
    bodies, headers = scripts("servers").open_inference_bodies(images, {"mode": "random"})
    length = int(headers["Inference-Header-Content-Length"])
    document = json.loads(bodies[1][:length])
    assert document["parameters"] == {"mode": "random"}
    assert bodies[1][length:] == images[1].tobytes()
    assert document["inputs"][0]["parameters"]["binary_data_size"] == len(bodies[1]) - length


def test_probabilities_follow_the_json_of_an_answer_if_it_has_one(scripts: Any) -> None:
    vector = np.array([0.25, 0.75], "<f4")
    wrk = scripts("wrk")
    assert (wrk.probabilities({}, vector.tobytes()) == vector).all()
    assert (wrk.probabilities({"inference-header-content-length": "2"}, b"{}" + vector.tobytes()) == vector).all()


def test_this_process_is_found_in_its_session_and_has_memory(scripts: Any) -> None:
    machine = scripts("machine")
    members = machine.processes(os.getsid(0))
    assert os.getpid() in members
    held = machine.memory([os.getpid()])
    assert held["resident_mb"] >= held["pss_mb"] > 1


def test_processes_that_are_gone_hold_and_use_nothing(scripts: Any) -> None:
    machine = scripts("machine")
    assert machine.memory([2**22 + 1]) == {"resident_mb": 0, "pss_mb": 0}
    assert machine.cpu_seconds([2**22 + 1]) == 0


def cell(server: str, clients: int, number: int, rate: float, p99: float = 10.0, **more: Any) -> dict[str, Any]:
    return {
        "server": server, "clients": clients, "round": number, "per_second": rate, "p50_ms": 0.5, "p99_ms": p99,
        "ratio": rate / 5000, "processor_ratio": 0.9, "cpu_ms_each": 0.4, "quiet": True, **more,
    }  # fmt: skip


def run(cells: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    return {
        "cells": cells, "raw": {"lone": [{"p50_ms": 0.4, "quiet": True}]}, "servers": {}, "skipped": {},
        "processor": "a processor", "cores": 2, "versions": {"python": "3"}, "date": "2026-11-21", "rounds": 3,
        "seconds_per_cell": 4.0, "plain_model": "plain", "gated_model": "gated", **more,
    }  # fmt: skip


def verdicts(scripts: Any, document: dict[str, Any]) -> dict[str, tuple[str, str]]:
    return {row[0]: (row[2], row[3]) for row in scripts("serving_report").bars(document)}


def test_a_share_of_raw_is_the_median_of_the_rounds(scripts: Any) -> None:
    cells = [cell("ours", 32, number, rate) for number, rate in enumerate((1000, 4500, 4600), 1)]
    assert verdicts(scripts, run(cells))["of raw ONNX Runtime, 32 clients"] == ("0.9", "yes")
    cells = [cell("ours", 32, number, rate) for number, rate in enumerate((4000, 4300, 4600), 1)]
    assert verdicts(scripts, run(cells))["of raw ONNX Runtime, 32 clients"] == ("0.86", "no")


def test_the_strongest_peer_decides_and_those_not_measured_are_named(scripts: Any) -> None:
    cells = [cell("ours", 32, 1, 4500, 8.0), cell("mosec", 32, 1, 4600, 9.0), cell("triton", 32, 1, 4000, 7.0)]
    found = verdicts(scripts, run(cells))
    assert found["above every peer, 32 clients"] == ("0.978 of mosec; not measured: fastapi", "no")
    measured, met = found["p99 below every peer's, 32 clients"]
    assert met == "no"
    assert "triton (8.00 ms against 7.00 ms)" in measured


def test_beating_some_of_the_peers_is_not_beating_every_peer(scripts: Any) -> None:
    cells = [cell("ours", 32, 1, 4500), cell("mosec", 32, 1, 4000), cell("triton", 32, 1, 4100)]
    assert verdicts(scripts, run(cells))["above every peer, 32 clients"][1] == "-"
    assert verdicts(scripts, run([*cells, cell("fastapi", 32, 1, 3000)]))["above every peer, 32 clients"][1] == "yes"


def test_modes_are_compared_with_single_of_the_same_round(scripts: Any) -> None:
    cells = [cell("modes:single", 32, 1, 4000), cell("modes:single", 32, 2, 2000)]
    cells += [cell("modes:int8", 32, 1, 8000), cell("modes:int8", 32, 2, 4000)]
    assert verdicts(scripts, run(cells))["int8 of fp32, 32 clients"] == ("2", "yes")


def test_what_was_not_measured_is_neither_met_nor_missed(scripts: Any) -> None:
    assert set(verdicts(scripts, run([])).values()) == {("-", "-")}


def test_the_memory_of_one_mode_does_not_stand_for_all(scripts: Any) -> None:
    memory = {"resident_mb": 90.0, "highest_resident_mb": 94.0, "growth": 0.04, "modes": ["single"]}
    assert verdicts(scripts, run([], memory=memory))["resident, all modes loaded"] == ("-", "-")
    memory["modes"] = ["single", "ensemble", "random"]
    assert verdicts(scripts, run([], memory=memory))["resident, all modes loaded"][1] == "yes"
    assert verdicts(scripts, run([], memory=memory))["growth over 100 000 requests"] == ("4 %", "yes")


def test_a_verdict_from_a_disturbed_cell_says_so(scripts: Any) -> None:
    found = verdicts(scripts, run([cell("ours", 32, 1, 4500, quiet=False)]))
    assert found["of raw ONNX Runtime, 32 clients"] == ("0.9", "yes (disturbed)")


def test_the_page_has_a_row_per_server_and_names_what_was_skipped(scripts: Any) -> None:
    page = scripts("serving_report").markdown(
        run([cell("ours", 32, 1, 4500)], skipped={"modes:int8": "it has no graph"})
    )
    assert "| ours | 32 | 4500 | 0.50 | 10.00 | 0.900 | 0.900 | 0.0 % |" in page
    assert "- not measured, modes:int8: it has no graph" in page
