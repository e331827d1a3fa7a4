"""The demo's page: how it is put together, what it looks like, and how it is served."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from typing import Any, cast

import gradio as gr
import torch
import uvicorn
from starlette.applications import Starlette
from starlette.types import ASGIApp

from serving.demo import fragments, words
from serving.demo.duel import add_duel
from serving.demo.shelf import Shelf
from serving.listener import bind, url_of
from zoo.pictures import MAX_PIXELS

MAX_FILE_SIZE = "8mb"
MAX_WAITING = 16
"""Attacks; the next is refused."""
KEPT_SECONDS = 3600
"""Uploads and results older than this are deleted; the page looks as often."""

# A region is announced only if it was one before its text changed; gradio has no parameter for that.
_ON_LOAD = "() => document.getElementById('status')?.setAttribute('aria-live', 'polite')"


def build(models: Sequence[str], *, max_pixels: int = MAX_PIXELS) -> gr.Blocks:
    """Build the page for `models`; for all that come with the package if there are none.

    Its endpoint "/attack" can be called with gradio_client; docs/demo.md shows how.

    Args:
        models: their names or sources.
        max_pixels: of an uploaded image.

    Raises:
        ManygatesError: if a model cannot be found or opened, or holds no weights; or if two have the same name.
    """
    shelf = Shelf(models, max_pixels=max_pixels)
    kept = (KEPT_SECONDS, KEPT_SECONDS)
    with gr.Blocks(title=words.TITLE, analytics_enabled=False, delete_cache=kept) as page:
        gr.Markdown(words.INTRODUCTION)
        add_duel(shelf, page.GRADIO_CACHE)
        page.load(None, js=_ON_LOAD)
    # a direct call would skip the queue, and with it the limits
    page.queue(max_size=MAX_WAITING, default_concurrency_limit=1, api_open=False)
    return cast(gr.Blocks, page)


def mount(app: Starlette, path: str, models: Sequence[str], *, max_pixels: int = MAX_PIXELS) -> ASGIApp:
    """Add the page for `models` to `app` under `path`, like "/demo", and return the application.

    From here on torch computes with one thread in this process.

    Raises:
        ManygatesError: as `build`.
    """
    page = build(models, max_pixels=max_pixels)
    # One small image is too little work to share, and the server beside it needs the other cores.
    torch.set_num_threads(1)
    # Only `launch` sets this, and without it gradio (6.31) takes any file of this machine for an upload.
    page.has_launched = True
    mounted: ASGIApp = gr.mount_gradio_app(
        cast(Any, app),  # asks for FastAPI, uses only what Starlette has
        page,
        path=path,
        theme=_theme(),
        css=fragments.style(),
        max_file_size=MAX_FILE_SIZE,
        footer_links=["api"],
        run_history=False,
        ssr_mode=False,
        enable_monitoring=False,
        mcp_server=False,
        pwa=False,
        show_error=True,
    )
    return mounted


def launch(models: Sequence[str], host: str = "127.0.0.1", port: int = 7860) -> None:
    """Serve the page for `models` alone, until SIGINT or SIGTERM.

    Args:
        models: all that come with the package if empty.
        host: the address to listen on.
        port: 0 takes a free one; the address is printed on standard error.

    Raises:
        BadInput: if the address cannot be used, as when the port is taken.
        ManygatesError: as `build`.
    """
    with contextlib.closing(bind(host, port)) as listener:
        app = mount(Starlette(), "/", models)
        print(f"attack demo on {url_of(listener)} (Ctrl-C stops it)", file=sys.stderr, flush=True)
        _Server(uvicorn.Config(app, log_level="warning", ws="none", timeout_graceful_shutdown=2)).run([listener])


class _Server(uvicorn.Server):
    """Uvicorn, which returns after a signal instead of raising it again."""

    def handle_exit(self, sig: int, frame: Any) -> None:
        self.force_exit = self.should_exit
        self.should_exit = True


def _theme() -> gr.themes.Base:
    """A theme with the system's own fonts (gradio's defaults would fetch some) and text of enough contrast."""
    theme = gr.themes.Default(
        primary_hue="teal",
        neutral_hue="slate",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )
    return theme.set(
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_800",
        button_primary_text_color="white",
        block_info_text_color="*body_text_color",
        block_info_text_color_dark="*body_text_color",
        block_label_text_color="*body_text_color",
        block_title_text_weight="600",
    )
