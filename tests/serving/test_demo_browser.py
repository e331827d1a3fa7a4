"""The attack demo in a real browser: what a visitor does, sees and downloads."""

import asyncio
import io
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

pytest.importorskip("torch", reason="the demo needs torch")
pytest.importorskip("gradio", reason="the demo needs gradio")
pytest.importorskip("playwright", reason="the browser is driven by playwright")

import torch
import uvicorn
from PIL import Image
from starlette.applications import Starlette
from starlette.types import ASGIApp

from serving import demo
from serving.server import bind, url_of

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = Path("/usr/bin/chromium")
ARGUMENTS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
]

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM.exists(), reason=f"no {CHROMIUM}; `apt-get install chromium` on Debian"),
    pytest.mark.filterwarnings("ignore:'future.no_silent_downcasting' is deprecated"),  # gradio with pandas 3
]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The page for a plain and a gated model that were not trained."""
    make_bundle = pytest.importorskip("demo_bundles").make_bundle
    folder = tmp_path_factory.mktemp("models")
    models = [make_bundle(folder / "plain", "plain"), make_bundle(folder / "gates", "gates", gated=True)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("gradio")))
