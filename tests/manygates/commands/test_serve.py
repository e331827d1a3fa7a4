"""serve, from the command line."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from zoo.hub import source as catalogue


def test_a_port_in_use_is_refused(model: Path, cli: Any) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        line = cli.refused("serve", model, "--port", str(taken.getsockname()[1]))
    assert "choose another with --host or --port, or stop what uses it" in line


def test_serving_without_any_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Any) -> None:
    monkeypatch.setattr(catalogue, "bundled_dir", lambda: tmp_path)
    assert "no model is bundled with this installation; name one" in cli.refused("serve")
    assert cli.done("list", "--json").json == []
