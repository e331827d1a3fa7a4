"""The attack demo in a real browser: what a visitor does, sees and downloads."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="the demo needs torch")
pytest.importorskip("gradio", reason="the demo needs gradio")
pytest.importorskip("playwright", reason="playwright drives the browser")

import torch
from PIL import Image

from zoo.bundle.bundle import write_bundle
from zoo.bundle.card import Paths
from zoo.gates.rgn import randomly_gate
from zoo.hub.source import open_model
from zoo.weights.checkpoint import Architecture, save_network
from zoo.weights.models import RGN_WEIGHTS, member_networks

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = Path("/usr/bin/chromium")
ARGUMENTS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
]
STANDARD = "standard-resnet20-cifar10"
PATIENCE = 60_000
"""Milliseconds for an attack on a machine that is busy with something else."""

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM.exists(), reason=f"no {CHROMIUM}; `apt-get install chromium` on Debian"),
    # gradio's queue uses what pandas 3 is about to drop
    pytest.mark.filterwarnings("ignore::pandas.errors.Pandas4Warning"),
]


def write_gates(folder: Path) -> str:
    """Write a gated model whose candidates are the standard one's layers with a little noise."""
    standard = open_model(STANDARD)
    card = standard.card
    rgn = randomly_gate(
        member_networks(standard, "single")[0], start="copy", noise=0.05, generator=torch.Generator().manual_seed(0)
    )
    gates = rgn.num_gates
    card = replace(
        card,
        name="noisy-gates",
        architecture=replace(
            card.architecture,
            gated_layers=tuple(layer.conv for layer in rgn.layers),
            candidates=2,
            sharing="independent",
        ),
        paths=Paths(single="0" * gates, ensemble=()),
        variants=("single", "gated"),
        results=tuple(result for result in card.results if result.variant == "single"),
        lint=tuple(lint for lint in card.lint if lint.variant == "single"),
        int8=None,
    )
    weights_file = folder.parent / "noisy-gates.safetensors"
    save_network(weights_file, rgn, Architecture(network="resnet20", candidates=2, sharing="independent"))
    # the demo opens no graph, so these may be empty
    write_bundle(folder, card, {"single.onnx": b"", "gated.onnx": b"", RGN_WEIGHTS: weights_file})
    return f"local-dir:{folder}"


@pytest.fixture(scope="module")
def url(
    tmp_path_factory: pytest.TempPathFactory, serve_page: Callable[[Sequence[str]], AbstractContextManager[str]]
) -> Iterator[str]:
    with serve_page([STANDARD, write_gates(tmp_path_factory.mktemp("models") / "noisy-gates")]) as server:
        yield f"{server}/demo/"


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield opened
        opened.close()


@contextmanager
def visiting(browser: "Browser", url: str) -> Iterator["Page"]:
    """Open the page; nothing may go wrong in it or leave the machine."""
    complaints: list[str] = []
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))

    def stay_here(route: Any) -> None:
        if route.request.url.startswith((url, url.removesuffix("/demo/"), "data:", "blob:")):
            route.continue_()
        else:
            complaints.append(f"asked for {route.request.url}")
            route.abort()

    page.route("**/*", stay_here)
    page.goto(url)
    page.wait_for_selector("#attack")
    yield page
    context.close()
    assert complaints == []


@pytest.fixture
def page(browser: "Browser", url: str) -> Iterator["Page"]:
    with visiting(browser, url) as opened:
        yield opened


@pytest.fixture(scope="module")
def attacked(browser: "Browser", url: str) -> Iterator["Page"]:
    """The page after an attack; a test leaves the results as they are."""
    with visiting(browser, url) as opened:
        attack(opened)
        yield opened


def set_number(page: "Page", selector: str, value: int) -> None:
    field = page.locator(f"{selector} input[type=number]")
    field.fill(str(value))
    field.press("Tab")


def attack(page: "Page") -> str:
    """Press the button and return what the page says at the end."""
    page.click("#attack")
    page.wait_for_function("document.getElementById('status').textContent.includes('Model B: ')")
    for side in "ab":
        page.wait_for_selector(f"#summary-{side} .verdict")
    return page.inner_text("#status")


def picture(page: "Page", name: str) -> tuple[bytes, str]:
    """Return a shown picture's bytes and the type that the server gave it."""
    page.locator(f"#{name} img").scroll_into_view_if_needed()
    answer = page.request.get(page.get_attribute(f"#{name} img", "src") or "")
    return answer.body(), answer.headers["content-type"]


def levels(file: Path) -> np.ndarray:
    with Image.open(file) as image:
        assert image.format == "PNG"
        return np.asarray(image).astype(int)


def test_a_visitor_attacks_a_drawing_and_downloads_the_very_image(page: "Page", tmp_path: Path) -> None:
    assert not page.is_visible("#summary-a")
    set_number(page, "#eps", 6)
    page.wait_for_function("document.getElementById('eps-text').textContent.includes('6/255 = 0.0235')")

    said = attack(page)

    assert "Model A: ✗ Fooled." in said
    assert "6/255" in page.inner_text("#summary-a")
    assert page.locator("#details-b .votes tbody tr").count() >= 1
    for side in "ab":
        files = {}
        for name in ("clean", "adversarial", "change"):
            content, content_type = picture(page, f"{name}-{side}")
            assert content_type == "image/png"
            files[name] = tmp_path / f"{name}-{side}.png"
            files[name].write_bytes(content)
        with page.expect_download() as download:
            page.click(f"#download-{side}")
        assert download.value.suggested_filename == f"model-{side}-adversarial-6-of-255.png"
        download.value.save_as(tmp_path / "downloaded.png")
        assert (tmp_path / "downloaded.png").read_bytes() == files["adversarial"].read_bytes()
        assert levels(files["adversarial"]).shape == (32, 32, 3)
        assert 0 < np.abs(levels(files["adversarial"]) - levels(files["clean"])).max() <= 6


def test_pictures_are_enlarged_without_smoothing_and_have_a_text_for_those_who_do_not_see_them(
    attacked: "Page",
) -> None:
    shown = attacked.evaluate(
        "[...document.querySelectorAll('.side .picture img')].map("
        "i => [i.naturalWidth || 32, getComputedStyle(i).imageRendering, i.alt])"
    )

    assert len(shown) == 6
    assert {(width, rendering) for width, rendering, _ in shown} == {(32, "pixelated")}
    assert all(re.search(r"image of model [AB]", text) for _, _, text in shown)
    assert attacked.get_attribute("#status", "aria-live") == "polite"


def test_on_a_phone_nothing_is_wider_than_the_screen(attacked: "Page") -> None:
    attacked.set_viewport_size({"width": 400, "height": 900})

    assert attacked.evaluate("document.documentElement.scrollWidth") == 400


def test_another_model_shows_its_own_card_and_hides_what_belonged_to_the_last(page: "Page") -> None:
    attack(page)

    page.click("#model-b input")
    page.get_by_role("option", name="noisy-gates, single").click()

    page.get_by_role("heading", name="Model B: noisy-gates, single").wait_for()
    page.wait_for_selector("#summary-b", state="hidden")
    assert page.is_visible("#summary-a")


def test_the_keyboard_alone_is_enough(page: "Page") -> None:
    page.focus("#method input")
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    page.focus("#attack")
    page.keyboard.press("Enter")

    page.wait_for_selector("#summary-a .verdict")
    assert "1 gradient evaluation (1 step)" in page.inner_text("#summary-a")


def test_a_file_that_is_no_image_is_answered_in_words(page: "Page", tmp_path: Path) -> None:
    (tmp_path / "text.png").write_bytes(b"<b>bold</b>")

    page.click("#image button[aria-label='Remove Image']")
    page.set_input_files("#image input[type=file]", tmp_path / "text.png")
    page.wait_for_selector("#image img")
    page.click("#attack")

    message = page.wait_for_selector(".toast-body").inner_text()
    page.wait_for_function("document.getElementById('status').textContent.includes('did not run')")
    assert b"<b>bold<".hex(" ") in message


@pytest.mark.data
def test_a_random_test_image_comes_with_its_label(page: "Page") -> None:
    page.click("#random")
    page.wait_for_function("!document.querySelector('#label input').value.startsWith('automatic')")
    label = page.input_value("#label input")
    attack(page)

    assert label in page.inner_text("#summary-a")
    assert "none given" not in page.inner_text("#summary-a")
