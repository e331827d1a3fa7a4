"""The attack demo: its arithmetic in closed form, its page through gradio_client."""

import asyncio
import io
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="the demo needs torch")
pytest.importorskip("gradio", reason="the demo needs gradio")

import httpx
import torch
import uvicorn
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from serving.demo import page as demo
from serving.listener import bind, url_of
from zoo import networks
from zoo.bundle import card as cards
from zoo.bundle.bundle import EARLY_EXIT_FILE, Bundle, write_bundle
from zoo.bundle.card import Card, Check, InputFormat, Paths, Result, Training
from zoo.data.datasets import DATASETS
from zoo.errors import BadInput, MissingFile, UnknownName
from zoo.gates.rgn import randomly_gate
from zoo.weights.checkpoint import Architecture, save_network
from zoo.weights.models import PLAIN_WEIGHTS, RGN_WEIGHTS, load_exits

# gradio's queue uses what pandas 3 is about to drop
pytestmark = pytest.mark.filterwarnings("ignore::pandas.errors.Pandas4Warning")

PLAIN, GATED, MNIST = "plain/single", "gates/gated", "digits/single"
GATES = 7  # of ResNet-8


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_bundle(
    folder: Path, name: str, *, gated: bool = False, dataset: str = "cifar10", network: str = "resnet8", exits: int = 1
) -> str:
    """Write the bundle of a network that was not trained; its graphs are empty, because the demo opens none."""
    source = DATASETS[dataset]
    torch.manual_seed(3)
    template = networks.build(network, images=source.format, classes=10)
    with torch.no_grad():  # not trained, so all answers are nearly equal: spread them
        last = list(template.modules())[-1]
        assert isinstance(last, torch.nn.Linear)
        last.weight.mul_(10)
    rgn = randomly_gate(template, candidates=2) if gated else None
    layers = tuple(layer.conv for layer in rgn.layers) if rgn else ()
    card = Card(
        name=name,
        description="Not trained",
        method="standard",
        license="apache-2.0",
        dataset=dataset,
        architecture=cards.NetworkSummary(
            name=network,
            options={},
            gated_layers=layers,
            candidates=2 if gated else 1,
            sharing="independent" if gated else None,
            parameters=2,
            single_path_parameters=1,
        ),
        input=InputFormat(
            channels=source.format.channels,
            height=source.format.height,
            width=source.format.width,
            range=(0.0, 1.0),
            mean=source.format.mean,
            std=source.format.std,
            resize="bicubic",
        ),
        classes=source.classes,
        exits=tuple(cards.Exit(macs=index + 1) for index in range(exits)) if exits > 1 else (),
        paths=Paths(single="0" * GATES, ensemble=("0" * GATES, "1" * GATES))
        if gated
        else Paths(single=None, ensemble=()),
        variants=("single", "ensemble", "gated") if gated else ("single",),
        training=Training(recipe={}, seed=0, commit="abc", versions={}, date="2026-11-21", summary="Not trained"),
        results=(measured("single"), measured("single", protocol="whitebox", eps=0.01, held=False)),
        files={},
    )
    weights_file = folder.parent / f"{name}.safetensors"
    architecture = Architecture(
        network=network, dataset=dataset, candidates=2 if gated else 1, sharing="independent" if gated else None
    )
    save_network(weights_file, rgn or template, architecture)
    graphs: dict[str, bytes | Path | str] = {f"{variant}.onnx": b"" for variant in card.variants}
    if exits > 1:
        graphs[EARLY_EXIT_FILE] = b""
    write_bundle(folder, card, {**graphs, RGN_WEIGHTS if gated else PLAIN_WEIGHTS: weights_file})
    return f"local-dir:{folder}"


def measured(variant: str, *, protocol: str = "clean", eps: float = 0.0, held: bool = True) -> Result:
    return Result(
        protocol=protocol,
        variant=variant,
        attack="PGD" if eps else "none",
        eps=eps,
        eps_fraction="1/100" if eps else "0",
        steps=50 if eps else 0,
        step_size=eps / 5,
        restarts=5 if eps else 0,
        images=1000,
        seed=0,
        accuracy=0.25 if eps else 0.8765,
        interval=(0.2, 0.3) if eps else (0.86, 0.89),
        note="",
        checks=(Check(name="gradients are not zero", held=held, detail=""),),
        date="2026-11-21",
        command="manygates evaluate",
    )


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("models")
    return [
        make_bundle(folder / "plain", "plain"),
        make_bundle(folder / "gates", "gates", gated=True),
        make_bundle(folder / "digits", "digits", dataset="mnist", network="lenet"),
    ]


@pytest.fixture(scope="module")
def shelf(models: list[str]) -> demo.Shelf:
    return demo.Shelf(models)


@pytest.fixture(scope="module")
def server(models: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The page as `serve --demo` has it: mounted into another application; yields the URL of that."""
    app = Starlette(routes=[Route("/", lambda request: PlainTextResponse("the index"))])
    servers: list[uvicorn.Server] = []

    async def serve() -> None:
        # mounted where a loop runs: where none does, gradio makes eight and never closes them
        config = uvicorn.Config(demo.mount(app, "/demo", models), log_level="error", ws="none")
        config.timeout_graceful_shutdown = 1
        servers.append(uvicorn.Server(config))
        await servers[0].serve([listener])

    with pytest.MonkeyPatch.context() as patch, bind("127.0.0.1", 0) as listener:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("gradio")))
        thread = threading.Thread(target=lambda: asyncio.run(serve()))
        thread.start()
        try:
            while thread.is_alive() and not (servers and servers[0].started):
                time.sleep(0.02)
            assert thread.is_alive()
            yield url_of(listener)
        finally:
            for server in servers:
                server.should_exit = True
            thread.join(timeout=10)


@pytest.fixture(scope="module")
def client(server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    opened = Client(f"{server}/demo/", verbose=False, download_files=tmp_path_factory.mktemp("client"))
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def image_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture whose levels reach 0 and 255, where the ball is cut off."""
    file = tmp_path_factory.mktemp("images") / "picture.png"
    smooth = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1)
    smooth[:4], smooth[-4:] = 0, 255
    Image.fromarray(smooth).save(file)
    return file


PICTURES = ("clean", "adversarial", "change")


def ask(client: Client, image: Any, **settings: Any) -> dict[str, Any]:
    """Attack; the pictures, labels and texts of both models by name."""
    defaults = {"label": "automatic", "model_a": PLAIN, "model_b": GATED, "steps": 3, "eps_levels": 8}
    answer = client.predict(image=image, api_name="/attack", **{**defaults, **settings})
    names = (*PICTURES, "clean_answer", "adversarial_answer", "summary", "scale", "details", "download")
    assert len(answer) == 2 * len(names) + 2
    return {
        "a": dict(zip(names, answer[: len(names)], strict=True)),
        "b": dict(zip(names, answer[len(names) :][: len(names)], strict=True)),
        "report": answer[-2],
        "status": answer[-1],
    }


def pixels(file: str | Path) -> np.ndarray:
    with Image.open(file) as image:
        assert image.format == "PNG"
        return np.asarray(image).astype(int)


def distance(side: dict[str, Any]) -> int:
    return int(np.abs(pixels(side["adversarial"]) - pixels(side["clean"])).max())


# ---------------------------------------------------------------------------------------------- the attack, closed form


class HalfSpace(torch.nn.Module):
    """Answers class 1 where the mean of all levels is above `boundary`, and class 0 elsewhere."""

    def __init__(self, boundary: float) -> None:
        super().__init__()
        self.boundary = boundary

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        score = 255 * images.flatten(1).mean(1) - self.boundary
        return torch.stack([-score, score], 1)


def half_space(shelf: demo.Shelf, boundary: float) -> demo.Contestant:
    card = shelf.card(PLAIN)[0]
    return demo.Contestant(name="half-space", variant="single", card=card, network=HalfSpace(boundary).eval())


@pytest.mark.parametrize("method", ["FGSM", "PGD"])
@pytest.mark.parametrize(("eps_levels", "broken"), [(2, False), (3, True)])
def test_a_half_space_falls_exactly_when_the_whole_levels_reach_its_boundary(
    shelf: demo.Shelf, method: demo.Method, eps_levels: int, broken: bool
) -> None:
    model = half_space(shelf, 102.5)
    clean = np.full((3, 4, 4), 100, dtype=np.uint8)

    crafted = demo.craft(model, clean, 0, demo.Attack(method=method, eps_levels=eps_levels, steps=12, restarts=2))

    assert (crafted.levels == 100 + eps_levels).all()
    answer = model.probabilities(torch.from_numpy(crafted.levels / np.float32(255))[None], random.Random(0))
    assert bool(answer.argmax() == 1) == broken
    steps = 1 if method == "FGSM" else 12 * (1 if broken else 2)
    assert crafted.gradients == steps


def test_an_attack_stops_at_black_and_white(shelf: demo.Shelf) -> None:
    clean = np.full((3, 4, 4), 253, dtype=np.uint8)

    crafted = demo.craft(half_space(shelf, 1000.0), clean, 0, demo.Attack(eps_levels=8, steps=10))

    assert crafted.levels.max() == 255


def test_the_change_is_amplified_around_grey() -> None:
    clean = np.array([100, 100, 100, 100], dtype=np.uint8).reshape(1, 2, 2)
    adversarial = np.array([100, 102, 97, 255], dtype=np.uint8).reshape(1, 2, 2)

    assert demo.amplified(clean, adversarial, 10).ravel().tolist() == [128, 148, 98, 255]


def test_a_gradient_of_random_gates_averages_over_fresh_paths(shelf: demo.Shelf) -> None:
    gates = shelf.contestant(GATED)
    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    first, second = (gates.differentiable(random.Random(0))(images) for _ in range(2))
    model = gates.differentiable(random.Random(0))

    assert torch.equal(first, second), "the same generator gives the same paths"
    assert not torch.equal(model(images), model(images)), "each call draws new ones"
    assert torch.allclose(first.exp().sum(), torch.tensor(1.0), atol=1e-5)
    assert gates.passes == demo.EOT_DRAWS


def test_settings_out_of_range_are_refused_with_the_range() -> None:
    with pytest.raises(BadInput, match="steps is 0, expected a whole number from 1 to 50"):
        demo.Attack(steps=0)
    with pytest.raises(BadInput, match=r"eps_levels is 2\.5, expected a whole number"):
        demo.Attack(eps_levels=2.5)  # type: ignore[arg-type]
    with pytest.raises(UnknownName, match="unknown attack 'CW'"):
        demo.Attack(method="CW")  # type: ignore[arg-type]


# ----------------------------------------------------------------------------------------------------------- the models


def test_a_plain_model_stands_against_random_gates_by_default(shelf: demo.Shelf) -> None:
    assert shelf.defaults == (PLAIN, GATED)
    assert [value for _, value in shelf.choices] == [PLAIN, "gates/single", "gates/ensemble", GATED, MNIST]


def test_a_multi_exit_model_is_attacked_at_its_last_exit(tmp_path: Path) -> None:
    shelf = demo.Shelf([make_bundle(tmp_path / "leaver", "leaver", network="msdnet3", exits=3)])
    contestant = shelf.contestant("leaver/single")
    levels = np.random.default_rng(0).integers(0, 256, size=(3, 32, 32)).astype(np.uint8)
    with torch.no_grad():
        every_exit = load_exits(Bundle.open(tmp_path / "leaver"))(torch.from_numpy(levels / np.float32(255))[None])
    answer = contestant.probabilities(torch.from_numpy(levels / np.float32(255))[None], random.Random(0))[0, 0]
    assert answer.tolist() == pytest.approx(every_exit[-1][0].softmax(0).tolist(), abs=1e-5)
    assert answer.tolist() != pytest.approx(every_exit[0][0].softmax(0).tolist(), abs=1e-3)
    crafted = demo.craft(contestant, levels, int(answer.argmax()), demo.Attack(eps_levels=2, steps=2))
    assert np.abs(crafted.levels.astype(int) - levels).max() <= 2
    assert "one network with 3 exits, of which the last answers" in demo.card_html(*shelf.card("leaver/single"))


def test_an_unknown_choice_is_refused_with_the_known_ones(shelf: demo.Shelf) -> None:
    with pytest.raises(UnknownName, match=r"did you mean 'plain/single'"):
        shelf.contestant("plain/singel")


def test_the_same_name_twice_is_refused(models: list[str]) -> None:
    with pytest.raises(BadInput, match="'plain' is to be shown twice"):
        demo.Shelf([models[0], models[0]])


def test_a_bundle_without_weights_is_refused(models: list[str], tmp_path: Path) -> None:
    card = Bundle.open(models[0].removeprefix("local-dir:")).card
    write_bundle(tmp_path / "bare", card, {"single.onnx": b""})

    with pytest.raises(MissingFile, match=r"holds no weights\.safetensors, but an attack needs gradients"):
        demo.Shelf([f"local-dir:{tmp_path / 'bare'}"])


def test_a_card_shows_what_was_measured_and_what_was_not(shelf: demo.Shelf) -> None:
    text = demo.card_html(shelf.card(PLAIN)[0], "single")

    assert "<strong>87.7 %</strong> [86.0, 89.0]" in text or "<strong>87.6 %</strong> [86.0, 89.0]" in text
    assert "n = 1,000, 2026-11-21" in text
    assert "PGD-50 x 5, n = 1,000" in text
    assert "a sanity check failed: gradients are not zero" in text
    assert text.count("not measured") == 2  # white-box at 0.03, transfer
    assert "The robustness linter has not looked at this variant." in text


def test_a_card_says_of_a_variant_only_what_was_measured_of_it(shelf: demo.Shelf) -> None:
    assert demo.card_html(*shelf.card(GATED)).count("not measured") == 4


# ------------------------------------------------------------------------------------------------------------- the page


def test_the_endpoint_is_typed(client: Client) -> None:
    endpoints = client.view_api(return_format="dict", print_info=False)["named_endpoints"]

    assert list(endpoints) == ["/attack"]
    parameters = {entry["parameter_name"]: entry for entry in endpoints["/attack"]["parameters"]}
    assert list(parameters) == [
        *("image", "label", "model_a", "model_b", "method", "crafted"),
        *("eps_levels", "steps", "restarts", "seed", "amplification"),
    ]
    assert parameters["method"]["type"]["enum"] == ["PGD", "FGSM"]
    assert parameters["eps_levels"]["type"]["type"] == "number"


def test_the_application_around_the_page_still_answers(server: str) -> None:
    assert httpx.get(server).text == "the index"
    assert httpx.get(f"{server}/demo/").status_code == 200


@pytest.mark.parametrize("method", ["FGSM", "PGD"])
@pytest.mark.parametrize("eps_levels", [1, 8])
def test_what_comes_back_is_png_and_within_the_ball(
    client: Client, image_file: Path, method: str, eps_levels: int
) -> None:
    answer = ask(client, handle_file(image_file), method=method, eps_levels=eps_levels)

    for letter in "ab":
        side = answer[letter]
        assert (pixels(side["clean"]) == pixels(image_file)).all(), "a 32x32 picture is shown as it is"
        assert distance(side) == answer["report"][letter]["measured_linf_levels"]
        assert 0 < distance(side) <= eps_levels
        assert (pixels(side["download"]) == pixels(side["adversarial"])).all()
        assert pixels(side["change"]).shape == (32, 32, 3)
        assert f"{distance(side)}/255, measured on the PNG file; allowed {eps_levels}/255" in side["summary"]
        assert len(side["clean_answer"]["confidences"]) == 3
    assert answer["report"]["b"]["gradient_evaluations"] == demo.EOT_DRAWS * (1 if method == "FGSM" else 3)


@pytest.mark.parametrize("method", ["FGSM", "PGD"])
def test_eps_0_returns_the_image_itself(client: Client, image_file: Path, method: str) -> None:
    answer = ask(client, handle_file(image_file), method=method, eps_levels=0, model_b="gates/ensemble")

    for letter in "ab":
        assert (pixels(answer[letter]["adversarial"]) == pixels(image_file)).all()
        assert (pixels(answer[letter]["change"]) == 128).all()
        assert answer["report"][letter]["verdict"] == "held"


def test_random_gates_vote_on_fresh_paths(client: Client, image_file: Path) -> None:
    answer = ask(client, handle_file(image_file))

    votes = answer["report"]["b"]["votes"]
    assert sum(votes["clean"].values()) == sum(votes["adversarial"].values()) == votes["draws"] == demo.VOTES
    assert "The vote of 32 fresh random paths" in answer["b"]["details"]
    assert answer["report"]["a"]["votes"] is None
    assert "which path will answer" in answer["b"]["summary"]


def test_the_same_seed_gives_the_same_result_and_another_seed_another(client: Client, image_file: Path) -> None:
    first, second, third = (
        ask(client, handle_file(image_file), model_a=GATED, model_b=GATED, seed=seed, steps=2) for seed in (5, 5, 6)
    )

    assert (pixels(first["a"]["adversarial"]) == pixels(second["a"]["adversarial"])).all()
    assert (pixels(first["a"]["adversarial"]) != pixels(third["a"]["adversarial"])).any()
    assert first["report"]["a"]["votes"] == second["report"]["a"]["votes"]


def test_a_transferred_image_is_the_one_crafted_on_the_other_model(client: Client, image_file: Path) -> None:
    answer = ask(client, handle_file(image_file), crafted="a", model_b="gates/single")

    assert (pixels(answer["a"]["adversarial"]) == pixels(answer["b"]["adversarial"])).all()
    assert answer["report"]["b"]["crafted_on"] == PLAIN
    assert "The attacker knows nothing of this model" in answer["b"]["summary"]
    assert "The attacker knows everything" in answer["a"]["summary"]
    assert "same weights" not in answer["b"]["summary"]


def test_a_transfer_within_one_bundle_says_so(client: Client, image_file: Path) -> None:
    answer = ask(
        client, handle_file(image_file), crafted="b", model_a="gates/single", model_b="gates/ensemble", steps=2
    )

    assert "Both come from the same weights" in answer["a"]["summary"]
    assert answer["report"]["b"]["gradient_evaluations"] == 2 * 2, "an ensemble of two, two steps"


def test_a_clean_answer_that_is_wrong_is_no_merit_of_the_attack(client: Client, image_file: Path) -> None:
    clean = ask(client, handle_file(image_file), eps_levels=0)["report"]["a"]["clean_answer"]
    label = next(name for name in DATASETS["cifar10"].classes if name != clean)

    answer = ask(client, handle_file(image_file), label=label)

    assert answer["report"]["a"]["verdict"] == "wrong before"
    assert "Wrong before the attack" in answer["a"]["summary"]
    assert answer["report"]["a"]["label_given"] is True


def test_a_large_photograph_is_scaled_to_what_the_model_takes(client: Client, tmp_path: Path) -> None:
    file = tmp_path / "photograph.jpg"
    Image.effect_noise((640, 400), 60).convert("RGB").save(file)

    answer = ask(client, handle_file(file), steps=1)

    assert pixels(answer["a"]["clean"]).shape == (32, 32, 3)


# -------------------------------------------------------------------------------------------------------- what is wrong


def write_frames(file: Path) -> None:
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    frames[0].save(file, save_all=True, append_images=frames[1:])


def write_bytes(content: bytes) -> Callable[[Path], object]:
    return lambda file: file.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("a.gif", write_frames, "are no PNG, JPEG or WEBP file"),
        ("a.png", write_frames, "an animation of 2 frames"),
        ("a.webp", write_frames, "an animation of 2 frames"),
        ("text.png", write_bytes(b"<script>"), "are no PNG, JPEG or WEBP file"),
        ("huge.png", lambda file: Image.new("1", (4000, 4000)).save(file), "expected at most 4,000,000"),
        ("cut.png", write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0"), "cannot be decoded"),
    ],
)
def test_a_file_that_is_no_still_image_is_refused_in_words(
    client: Client, tmp_path: Path, name: str, write: Callable[[Path], object], message: str
) -> None:
    write(tmp_path / name)

    with pytest.raises(AppError, match=message):
        ask(client, handle_file(tmp_path / name))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"label": None}, "no true label is chosen"),
        ({"label": "7"}, "'7' is no class of plain, expected one of airplane"),
        ({"model_a": None}, "no model A is chosen"),
        ({"crafted": "a", "model_b": MNIST}, "cannot be transferred between plain .* and digits"),
        ({"eps_levels": 33}, "greater than maximum value 32"),
        ({"steps": 51}, "greater than maximum value 50"),
        ({"seed": None}, "seed is None, expected a whole number"),
        ({"model_a": "plain/gated"}, "not in the list of choices"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused_in_words(
    client: Client, image_file: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(AppError, match=message):
        ask(client, handle_file(image_file), **settings)


def test_no_image_is_refused_in_words(client: Client) -> None:
    with pytest.raises(AppError, match="there is no image"):
        ask(client, None)


def test_a_file_over_the_limit_is_refused(client: Client, tmp_path: Path) -> None:
    (tmp_path / "fat.png").write_bytes(bytes(9 * 2**20))

    with pytest.raises(ValueError, match="exceeds the maximum file size"):
        ask(client, handle_file(tmp_path / "fat.png"))


def test_a_file_of_the_server_cannot_be_named_as_an_upload(server: str, image_file: Path) -> None:
    upload = {"path": str(image_file), "meta": {"_type": "gradio.FileData"}}
    data = [upload, "automatic", PLAIN, PLAIN, "FGSM", "own", 1, 1, 1, 0, 1]

    call = httpx.post(f"{server}/demo/gradio_api/call/attack", json={"data": data})
    answer = httpx.get(f"{server}/demo/gradio_api/call/attack/{call.json()['event_id']}")

    assert answer.text.startswith("event: error")
    assert "was not uploaded by a user" in answer.text


def test_the_queue_cannot_be_passed_by(server: str) -> None:
    assert httpx.post(f"{server}/demo/gradio_api/run/attack", json={"data": []}).status_code == 404


def test_a_port_in_use_is_refused_before_any_model_is_opened() -> None:
    with bind("127.0.0.1", 0) as listener, pytest.raises(BadInput, match="choose another with --host or --port"):
        demo.launch(["no such model"], "127.0.0.1", listener.getsockname()[1])


@pytest.mark.slow
def test_the_page_alone_serves_until_it_is_told_to_stop(models: list[str], tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    code = f"from serving.demo import page; page.launch({models!r}, '127.0.0.1', {port})"
    environment = {**os.environ, "GRADIO_TEMP_DIR": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stderr is not None
            for line in process.stderr:
                if line.startswith("attack demo on"):
                    break
            assert "attack two models" in page_of(f"http://127.0.0.1:{port}/")
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=15) == 0
        finally:
            process.kill()


def page_of(url: str) -> str:
    deadline = time.monotonic() + 20
    while True:
        try:
            return httpx.get(url).text
        except httpx.ConnectError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def test_the_drawings_are_small_pictures_of_the_right_size() -> None:
    drawings = sorted((Path(demo.__file__).parent / "examples").glob("*.png"))

    assert len(drawings) == 5
    for file in drawings:
        with Image.open(io.BytesIO(file.read_bytes())) as image:
            assert (image.size, image.mode) == ((32, 32), "RGB")
