"""Bundles that change, come and go while a server runs: what it can load it serves, what it cannot it leaves alone."""

import asyncio
import http.client
import json
import shutil
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from serving.answers import Prediction, Predictor
from serving.http.app import Application
from serving.operations.settings import Settings
from serving.scheduling import repository
from serving.scheduling.repository import Repository
from serving.scheduling.service import Model, Service
from serving.server import build
from zoo.errors import BadInput, BundleError, ChecksumMismatch

IMAGE = np.random.default_rng(5).random((1, 3, 4, 4), dtype=np.float32)
RAW = {"inference-header-content-length": "0"}


class Server:
    """An application, and a client of it."""

    def __init__(self, application: Application, client: httpx.AsyncClient) -> None:
        self.application, self.client = application, client

    @property
    def repository(self) -> Repository:
        assert self.application.repository is not None
        return self.application.repository

    async def refresh(self, times: int = 1) -> None:
        for _ in range(times):
            await self.repository.refresh(self.application.service)

    async def scale(self, path: str = "tiny") -> float | int:
        """Return the scale of the bundle that answers, or the status of what is no answer."""
        answer = await self.client.post(f"/v2/models/{path}/infer", content=IMAGE.tobytes(), headers=RAW)
        return answer.status_code if answer.status_code != 200 else scale_of(answer.content, answer.headers)

    async def index(self) -> dict[tuple[str, str], tuple[str, str]]:
        entries = (await self.client.post("/v2/repository/index", json={})).json()
        assert all(entry.keys() == {"name", "version", "state", "reason"} for entry in entries)
        return {(entry["name"], entry["version"]): (entry["state"], entry["reason"]) for entry in entries}

    async def ready(self) -> bool:
        answer = await self.client.get("/v2/health/ready")
        assert answer.json() == {"ready": answer.status_code == 200}
        return answer.status_code == 200

    async def ask(self, change: str) -> httpx.Response:
        return await self.client.post(f"/v2/repository/models/{change}")


def scale_of(content: bytes, headers: Any) -> float:
    weights = np.random.default_rng(0).normal(size=(48, 3)).astype(np.float32)
    logits = np.frombuffer(content[int(headers["inference-header-content-length"]) :], "<f4")[3:]
    ratio = logits / (IMAGE.reshape(-1) @ weights)
    assert np.ptp(ratio) < 1e-3, "half of the one and half of the other"
    return round(float(ratio.mean()), 2)


@asynccontextmanager
async def serving(settings: Settings) -> AsyncIterator[Server]:
    application = build(settings)
    transport = httpx.ASGITransport(application)
    async with application.running(), httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        yield Server(application, client)


@pytest.fixture
def write(tmp_path: Path, write_bundle_dir: Callable[..., Path], make_card: Callable[..., Any]) -> Callable[..., Path]:
    """Return a function that writes a small bundle of a scale to a place below the test's folder."""

    def write_at(place: str, scale: float, name: str = "tiny") -> Path:
        folder, card = tmp_path / place, make_card(name, variants=("single",))
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            return write_bundle_dir(folder, card, scale=scale)
        except BadInput:  # what is there is too damaged to be replaced
            shutil.rmtree(folder)
            return write_bundle_dir(folder, card, scale=scale)

    return write_at


def settings_for(folder: Path, **changes: Any) -> Settings:
    return Settings(**{"threads": 1, "max_batch": 2, "model_repository": str(folder), **changes})


def run(main: Callable[[], Any]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(30):
            await main()

    asyncio.run(bounded())


# --- a changed bundle ---


def test_a_changed_bundle_takes_the_place_of_the_one_before_and_an_unchanged_one_is_left_alone(write) -> None:
    folder = write("tiny", 1)

    async def main() -> None:
        async with serving(Settings(threads=1, models=(f"local-dir:{folder}",))) as server:
            await server.refresh()
            served = server.application.service.find("tiny")
            assert await server.scale() == 1
            write("tiny", 2)
            assert await server.scale() == 1
            await server.refresh()
            assert await server.scale() == 2
            assert server.application.service.find("tiny") is not served
            renewed = server.application.service.find("tiny")
            await server.refresh()
            assert server.application.service.find("tiny") is renewed

    run(main)


def truncate(folder: Path) -> None:
    (folder / "single.onnx").write_bytes((folder / "single.onnx").read_bytes()[:-40])


def flip_a_bit(folder: Path) -> None:
    content = bytearray((folder / "single.onnx").read_bytes())
    content[-20] ^= 4
    (folder / "single.onnx").write_bytes(content)


def remove_the_graph(folder: Path) -> None:
    (folder / "single.onnx").unlink()


def cut_the_card(folder: Path) -> None:
    text = (folder / "card.json").read_text()
    (folder / "card.json").write_text(text[: len(text) // 2])


def garble_the_card(folder: Path) -> None:
    (folder / "card.json").write_bytes(b"\xff\xfe\x00")


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, remove_the_graph, cut_the_card, garble_the_card])
@pytest.mark.parametrize("place", ["tiny", "my models/tiny", "repository/tiny"])
def test_a_damaged_bundle_is_not_loaded_the_one_before_goes_on_and_a_repaired_one_is_loaded(
    write, tmp_path: Path, damage: Callable[[Path], None], place: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write(place, 1)
    if place.startswith("repository"):
        settings = settings_for(folder.parent)
    else:
        settings = Settings(threads=1, max_batch=2, models=(f"local-dir:{folder}",))

    async def main() -> None:
        async with serving(settings) as server:
            write(place, 2)
            damage(folder)
            for _ in range(3):
                await server.refresh()
                assert await server.scale() == 1
            state, reason = (await server.index())["tiny", "1"]
            assert state == "READY"
            assert reason
            for part in (str(tmp_path), tmp_path.name, "my models"):
                assert part not in reason
            assert caplog.text.count("the version before is still served") == 1, "said once, not at every look"
            write(place, 3)
            await server.refresh()
            assert await server.scale() == 3
            assert (await server.index())["tiny", "1"] == ("READY", "")
            metrics = (await server.client.get("/metrics")).text
            assert 'manygates_model_loads_total{model="tiny",outcome="failed"} 3.0' in metrics
            assert 'manygates_model_loads_total{model="tiny",outcome="loaded"} 1.0' in metrics

    run(main)


def test_a_reason_goes_when_the_bundle_that_is_served_comes_back(write, tmp_path: Path) -> None:
    folder = write("tiny", 1)
    shutil.copytree(folder, tmp_path / "kept")

    async def main() -> None:
        async with serving(Settings(threads=1, models=(f"local-dir:{folder}",))) as server:
            cut_the_card(folder)
            await server.refresh()
            assert (await server.index())["tiny", "1"][1] != ""
            shutil.rmtree(folder)
            shutil.copytree(tmp_path / "kept", folder)
            await server.refresh()
            assert (await server.index())["tiny", "1"] == ("READY", "")
            assert await server.scale() == 1

    run(main)


def test_a_bundle_that_is_copied_file_by_file_is_loaded_when_it_is_whole(write, tmp_path: Path) -> None:
    folder, new = write("tiny", 1), write("new", 2)

    async def main() -> None:
        async with serving(Settings(threads=1, models=(f"local-dir:{folder}",))) as server:
            for name in sorted(path.name for path in new.iterdir()):
                await server.refresh()
                assert await server.scale() == 1
                shutil.copyfile(new / name, folder / name)
            await server.refresh()
            assert await server.scale() == 2

    run(main)


def test_a_damaged_bundle_at_the_start_stops_a_server_that_names_it_and_not_one_that_only_finds_it(write) -> None:
    folder, other = write("repository/tiny", 1), write("repository/other", 2)
    truncate(folder)
    with pytest.raises(ChecksumMismatch):
        build(Settings(threads=1, models=(f"local-dir:{folder}",)))

    async def main() -> None:
        async with serving(settings_for(other.parent)) as server:
            assert await server.scale("tiny") == 404
            assert await server.scale("other") == 2
            assert (await server.index())["tiny", "1"][0] == "UNAVAILABLE"
            assert await server.ready() is False, "what should be served is not"
            assert (await server.client.get("/v2/models/other/ready")).status_code == 200, "this one is"
            write("repository/tiny", 3)
            await server.refresh()
            assert await server.scale("tiny") == 3
            assert await server.ready() is True

    run(main)


def test_what_cannot_be_loaded_does_not_keep_others_from_being_loaded(write, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = write("repository/a", 1), write("repository/b", 1)

    async def main() -> None:
        async with serving(settings_for(first.parent)) as server:
            write("repository/b", 2)
            cut_the_card(first)
            await server.refresh()
            assert (await server.scale("a"), await server.scale("b")) == (1, 2)
            (second / "card.json").unlink()
            (second / "card.json").mkdir()  # reading it is an error of the operating system's
            write("repository/a", 3)
            await server.refresh()
            assert (await server.scale("a"), await server.scale("b")) == (3, 2)

    run(main)


# --- a folder of bundles ---


def test_new_models_of_the_folder_are_served_and_vanished_ones_are_not(write) -> None:
    first = write("repository/a", 1)

    async def main() -> None:
        async with serving(settings_for(first.parent)) as server:
            assert await server.scale("a") == 1
            assert await server.scale("b") == 404
            write("repository/b", 2)
            await server.refresh()
            assert await server.scale("b") == 2
            shutil.rmtree(first)
            await server.refresh()
            assert await server.scale("a") == 1, "a bundle that is being replaced is away for a moment"
            await server.refresh()
            assert await server.scale("a") == 404
            assert (await server.index()).keys() == {("b", "1")}
            write("repository/a", 3)
            await server.refresh()
            assert await server.scale("a") == 3
            text = (await server.client.get("/metrics")).text
            assert 'manygates_model_loads_total{model="a",outcome="unloaded"} 1.0' in text
            assert 'manygates_model_loads_total{model="a",outcome="loaded"} 1.0' in text

    run(main)


def test_an_empty_folder_is_served_until_something_is_in_it(write, tmp_path: Path) -> None:
    (tmp_path / "repository").mkdir()

    async def main() -> None:
        async with serving(settings_for(tmp_path / "repository")) as server:
            assert await server.ready() is False
            assert (await server.client.post("/classify", content=b"x")).status_code == 404
            assert await server.index() == {}
            write("repository/a", 1)
            await server.refresh()
            assert await server.scale("a") == 1
            assert await server.ready() is True

    run(main)


def test_a_folder_that_goes_away_altogether_ends_nothing(write, caplog: pytest.LogCaptureFixture) -> None:
    folder = write("repository/a", 1)

    async def main() -> None:
        async with serving(settings_for(folder.parent, allow_repository_changes=True)) as server:
            folder.parent.rename(folder.parent.with_name("elsewhere"))
            await server.refresh()
            assert await server.scale("a") == 1
            assert (await server.ask("a/load")).status_code == 400
            assert await server.scale("a") == 1
            folder.parent.with_name("elsewhere").rename(folder.parent)
            await server.refresh()
            assert await server.scale("a") == 1

    run(main)
    assert "the model repository cannot be read (No such file or directory)" in caplog.text


@pytest.mark.parametrize("away", ["renamed", "emptied mount", "no permission", "broken link"])
def test_what_was_loaded_goes_on_while_the_folder_cannot_be_read_and_that_is_said_once(
    write, tmp_path: Path, away: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write("repository/a", 1).parent
    write("repository/b/1", 2)
    elsewhere = folder.with_name("elsewhere")

    async def main() -> None:
        async with serving(settings_for(folder, allow_repository_changes=True)) as server:
            await server.refresh()
            with monkeypatch.context() as patch:
                if away == "no permission":  # the tests' user may be one who may read everything
                    patch.setattr(Path, "iterdir", lambda _: (_ for _ in ()).throw(PermissionError(13, "denied")))
                else:
                    folder.rename(elsewhere)
                if away == "emptied mount":
                    folder.mkdir()
                if away == "broken link":
                    folder.symlink_to(tmp_path / "nowhere")
                for _ in range(5):
                    await server.refresh()
                    assert (await server.scale("a"), await server.scale("b/versions/1")) == (1, 2)
                assert await server.ready() is True
                assert caplog.text.count("what was loaded is still served") == 1
            if away == "emptied mount":
                folder.rmdir()
            if away == "broken link":
                folder.unlink()
            if elsewhere.exists():
                elsewhere.rename(folder)
            write("repository/a", 3)
            await server.refresh(2)
            assert (await server.scale("a"), await server.scale("b")) == (3, 2)

    caplog.set_level("INFO", "manygates.serving")
    run(main)
    assert caplog.text.count("can be read again") == 1


def test_a_bundle_that_cannot_be_read_is_still_served_and_its_neighbours_are_looked_after(
    write, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write("repository/a", 1).parent
    write("repository/b", 1)
    look = Path.stat

    def forbidden(self: Path, **options: Any) -> Any:
        if "a" in self.parts[-2:]:
            raise PermissionError(13, "Permission denied", str(self))
        return look(self, **options)

    async def main() -> None:
        async with serving(settings_for(folder)) as server:
            with monkeypatch.context() as patch:
                patch.setattr(Path, "stat", forbidden)
                await server.refresh(4)
                assert await server.scale("a") == 1
            write("repository/b", 2)
            with monkeypatch.context() as patch:
                patch.setattr(Path, "stat", forbidden)
                await server.refresh()
                assert (await server.scale("a"), await server.scale("b")) == (1, 2)
            await server.refresh()
            assert (await server.index())["a", "1"] == ("READY", "")

    run(main)


def test_a_link_is_followed_at_every_look(write, tmp_path: Path) -> None:
    """A release is made by changing where `current` leads to, for the whole repository, for a model or for a bundle."""
    for release in (1, 2):
        write(f"release-{release}/tiny", release)
        write(f"release-{release}/only-{release}", release)
        write(f"repository/.releases/{release}", 10 * release)
        write(f"named-{release}", 100 * release, "named")

    def switch(link: Path, target: Path) -> None:
        new = link.with_name(f".{link.name}.new")
        new.symlink_to(target)
        new.replace(link)  # as `ln -sfn` and kubelet do

    current, inside, named = tmp_path / "current", tmp_path / "repository" / "model", tmp_path / "named"

    def release(number: int) -> None:
        switch(current, tmp_path / f"release-{number}")
        switch(inside, tmp_path / "repository" / ".releases" / str(number))
        switch(named, tmp_path / f"named-{number}")

    release(1)

    async def main() -> None:
        own = (f"local-dir:{named}",)
        async with (
            serving(settings_for(current, models=own)) as first,
            serving(settings_for(tmp_path / "repository")) as second,
        ):
            for number in (1, 2, 1):
                release(number)
                await first.refresh(2)
                await second.refresh(2)
                assert await first.scale("tiny") == number
                assert await second.scale("model") == 10 * number
                assert await first.scale("named") == 100 * number
                assert await first.scale(f"only-{number}") == number
                assert await first.scale(f"only-{3 - number}") == 404
                assert await first.ready() is True

    run(main)


def test_a_link_that_is_changed_to_lead_out_of_the_folder_is_not_followed(write, tmp_path: Path) -> None:
    folder, outside = write("repository/.inside", 1).parent, write("outside", 2)
    (folder / "a").symlink_to(folder / ".inside")

    async def main() -> None:
        async with serving(settings_for(folder, allow_repository_changes=True)) as server:
            assert await server.scale("a") == 1
            (folder / "a").unlink()
            (folder / "a").symlink_to(outside)
            await server.refresh(3)
            assert await server.scale("a") == 1
            refused = await server.ask("a/load")
            assert refused.status_code == 400
            assert "leads out of the model repository" in refused.json()["error"]
            assert str(outside) not in refused.text
            assert await server.scale("a") == 1

    run(main)


def test_names_that_are_no_names_and_links_out_of_the_folder_are_ignored(write, tmp_path: Path) -> None:
    folder = write("repository/a", 1).parent
    outside = write("outside", 2)
    for name in (".hidden", "white space", "ä", "-b", "a" * 129, "c:d"):
        shutil.copytree(outside, folder / name)
    (folder / "link").symlink_to(outside)
    (folder / "versions").mkdir()
    (folder / "versions" / "1").symlink_to(outside)
    (folder / "card").mkdir()
    (folder / "card" / "card.json").symlink_to(outside / "card.json")
    (folder / "file").write_text("no folder")
    (folder / "nothing").mkdir()
    shutil.copytree(outside, folder / "inside" / "01")
    shutil.copytree(outside, folder / "inside" / "latest")
    (folder / "alias").symlink_to(folder / "a")  # within the folder links are fine

    async def main() -> None:
        async with serving(settings_for(folder)) as server:
            assert (await server.index()).keys() == {("a", "1"), ("alias", "1")}
            assert server.application.service.names == ["a", "alias"]
            for path in ("..%2f..%2foutside", "%2e%2e/outside", "../outside", "link", "card"):
                assert (await server.ask(f"{path}/load")).status_code in (403, 404)

    run(main)


def test_a_repository_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="expected a folder of bundles"):
        build(settings_for(tmp_path / "none"))


def test_a_name_is_served_once(write, tmp_path: Path) -> None:
    first, second = write("a", 1), write("b", 2)
    both = (f"local-dir:{first}", f"local-dir:{second}")
    with pytest.raises(BadInput, match="'tiny' is to be served twice; name each model once, or give it a name"):
        build(Settings(threads=1, models=both))
    named = build(Settings(threads=1, models=both, model_tables=[{"source": both[1], "name": "other"}]))
    assert named.service.names == ["tiny", "other"]

    folder = write("repository/tiny", 3).parent

    async def main() -> None:
        async with serving(settings_for(folder, models=both[:1])) as server:
            assert await server.scale() == 1
            await server.refresh()
            assert await server.scale() == 1
            [entry] = [entry for entry in server.repository.index() if entry["state"] == "UNAVAILABLE"]
            assert "is to be served twice" in entry["reason"]

    run(main)


# --- versions ---


def test_the_latest_version_is_the_default_and_each_is_served_by_its_path(write, tmp_path: Path) -> None:
    for version in (2, 9, 10):
        write(f"repository/tiny/{version}", version)

    async def main() -> None:
        async with serving(settings_for(tmp_path / "repository")) as server:
            assert await server.scale() == 10
            for version in (2, 9, 10):
                assert await server.scale(f"tiny/versions/{version}") == version
                assert (await server.client.get(f"/v2/models/tiny/versions/{version}/ready")).status_code == 200
            assert await server.scale("tiny/versions/3") == 404
            assert (await server.client.get("/v2/models/tiny")).json()["versions"] == ["2", "9", "10"]
            write("repository/tiny/11", 11)
            await server.refresh()
            assert await server.scale() == 11
            assert await server.scale("tiny/versions/10") == 10
            shutil.rmtree(tmp_path / "repository/tiny/11")
            await server.refresh(2)
            assert await server.scale() == 10
            document = (await server.client.post("/v2/models/tiny/versions/2/infer", content=b"x")).json()
            assert "error" in document

    run(main)


def test_an_answer_names_the_version_that_gave_it(write, tmp_path: Path) -> None:
    for version in (1, 2):
        write(f"repository/tiny/{version}", version)
    tensor = {"name": "images", "shape": [1, 3, 4, 4], "datatype": "FP32", "data": IMAGE.ravel().tolist()}

    async def main() -> None:
        async with serving(settings_for(tmp_path / "repository")) as server:
            for path, version in (("tiny", "2"), ("tiny/versions/1", "1"), ("tiny/versions/2", "2")):
                answer = await server.client.post(f"/v2/models/{path}/infer", json={"inputs": [tensor]})
                assert (answer.json()["model_name"], answer.json()["model_version"]) == ("tiny", version)

    run(main)


def test_of_a_source_with_versions_the_latest_takes_the_place_of_the_one_before(write, tmp_path: Path) -> None:
    write("tiny/1", 1)

    async def main() -> None:
        async with serving(Settings(threads=1, models=(f"local-dir:{tmp_path / 'tiny'}",))) as server:
            assert await server.scale() == 1
            write("tiny/2", 2)
            await server.refresh()
            assert await server.scale() == 2
            assert await server.scale("tiny/versions/2") == 2
            assert await server.scale("tiny/versions/1") == 404
            assert (await server.index()).keys() == {("tiny", "2")}
            shutil.rmtree(tmp_path / "tiny/2")
            await server.refresh()
            assert await server.scale() == 1

    run(main)


def test_a_bundle_that_changes_its_name_is_served_by_the_new_one_alone(write) -> None:
    folder = write("tiny", 1)

    async def main() -> None:
        async with serving(Settings(threads=1, models=(f"local-dir:{folder}",))) as server:
            write("tiny", 2, name="other")
            await server.refresh()
            assert await server.scale("other") == 2
            assert await server.scale("tiny") == 404

    run(main)


# --- clients that load and unload ---


@pytest.mark.parametrize("change", ["load", "unload"])
def test_clients_load_and_unload_nothing_unless_the_operator_allows_it(write, change: str) -> None:
    folder = write("repository/tiny", 1).parent

    async def main() -> None:
        async with serving(settings_for(folder)) as server:
            refused = await server.ask(f"tiny/{change}")
            assert refused.status_code == 403
            assert "MANYGATES_SERVE_ALLOW_REPOSITORY_CHANGES" in refused.json()["error"]
            assert await server.scale() == 1

    run(main)


def test_a_model_is_unloaded_loaded_and_loaded_again_on_request(write, tmp_path: Path) -> None:
    for version in (1, 2):
        write(f"repository/tiny/{version}", version)

    async def main() -> None:
        settings = settings_for(tmp_path / "repository", allow_repository_changes=True)
        async with serving(settings) as server:
            assert (await server.ask("tiny/unload")).json() == {}
            assert await server.scale() == 404
            assert set((await server.index()).values()) == {("UNAVAILABLE", "unloaded")}
            assert (await server.client.post("/v2/repository/index", json={"ready": True})).json() == []
            await server.refresh()
            assert await server.scale() == 404, "what was unloaded stays so"
            assert (await server.ask("tiny/unload")).status_code == 404
            assert (await server.ask("tiny/load")).json() == {}
            assert await server.scale() == 2
            assert await server.scale("tiny/versions/1") == 1
            write("repository/tiny/1", 7)
            assert (await server.ask("tiny/load")).status_code == 200
            assert await server.scale("tiny/versions/1") == 7
            truncate(tmp_path / "repository/tiny/1")
            failed = await server.ask("tiny/load")
            assert failed.status_code == 400
            assert "tiny was not loaded" in failed.json()["error"]
            assert str(tmp_path) not in failed.text
            assert tmp_path.name not in failed.text
            assert await server.scale("tiny/versions/1") == 7
            assert (await server.index())["tiny", "1"][0] == "READY"
            unknown = await server.ask("other/load")
            assert unknown.status_code == 404
            assert "the repository has no model 'other', only tiny" in unknown.json()["error"]

    run(main)


def test_a_version_that_has_gone_answers_no_longer_once_its_model_is_loaded_again(write, tmp_path: Path) -> None:
    for version in (1, 2, 3):
        write(f"repository/tiny/{version}", version)
    folder = tmp_path / "repository/tiny"

    async def main() -> None:
        async with serving(settings_for(folder.parent, allow_repository_changes=True)) as server:
            shutil.rmtree(folder / "3")
            answer = await server.ask("tiny/load")
            assert (answer.status_code, answer.json()) == (200, {"gone": ["3"]})
            assert (await server.scale(), await server.scale("tiny/versions/3")) == (2, 404)
            assert (await server.ask("tiny/unload")).status_code == 200
            shutil.rmtree(folder / "2")
            answer = await server.ask("tiny/load")
            assert (answer.status_code, answer.json()) == (200, {"gone": ["2"]})
            assert (await server.scale(), await server.scale("tiny/versions/2")) == (1, 404)
            assert (await server.index()) == {("tiny", "1"): ("READY", "")}
            assert await server.ready() is True
            shutil.rmtree(folder)
            answer = await server.ask("tiny/load")
            assert answer.status_code == 404
            assert "gone from the repository" in answer.json()["error"]
            assert await server.scale() == 404
            assert await server.ready() is False

    run(main)


def test_a_load_loads_what_it_can_and_names_what_failed(write, tmp_path: Path) -> None:
    for version in (1, 2, 3):
        write(f"repository/tiny/{version}", version)
    folder = tmp_path / "repository/tiny"

    async def main() -> None:
        async with serving(settings_for(folder.parent, allow_repository_changes=True)) as server:
            assert (await server.ask("tiny/unload")).status_code == 200
            truncate(folder / "2")
            shutil.rmtree(folder / "3")
            answer = await server.ask("tiny/load")
            assert answer.status_code == 400
            assert "version 2: " in answer.json()["error"]
            assert "Loaded: version 1" in answer.json()["error"]
            assert (await server.scale(), await server.scale("tiny/versions/2")) == (1, 404)
            assert (await server.index()).keys() == {("tiny", "1"), ("tiny", "2")}

    run(main)


@pytest.mark.parametrize(
    ("removed", "answering"), [(("1",), "Answering now: no version"), (("1", "2"), "Answering now: version 3")]
)
def test_a_load_that_fails_names_what_has_gone_and_what_answers(
    write, tmp_path: Path, serve_in_a_thread, removed: tuple[str, ...], answering: str
) -> None:
    """Over real sockets: REST and gRPC say the same."""
    grpc = pytest.importorskip("grpc")
    from serving.protocol.messages import SERVICE, message

    folder = tmp_path / "repository/tiny"
    for version in (*removed, *(["3"] if "3" in answering else [])):
        write(f"repository/tiny/{version}", 1)
    truncate(write("repository/tiny/5", 5))
    aside = tmp_path / "aside"
    settings = settings_for(folder.parent, allow_repository_changes=True, allow_empty=True, grpc_port=0)

    def over_rest(url: str, _: Application) -> str:
        answer = httpx.post(f"{url}/v2/repository/models/tiny/load")
        assert answer.status_code == 400
        return str(answer.json()["error"])

    def over_grpc(_: str, application: Application) -> str:
        with grpc.insecure_channel(f"127.0.0.1:{application.grpc_port}") as channel:
            call = channel.unary_unary(
                f"/{SERVICE}/RepositoryModelLoad", lambda request: request.SerializeToString(), lambda answer: answer
            )
            with pytest.raises(grpc.RpcError) as refused:
                call(message("RepositoryModelLoadRequest")(model_name="tiny"), timeout=10)
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        return str(refused.value.details())

    for ask in (over_rest, over_grpc):
        application = build(settings)
        aside.mkdir()
        with serve_in_a_thread(application) as url:
            for version in removed:
                (folder / version).rename(aside / version)
            told = ask(url, application)
        plural = "s" if len(removed) > 1 else ""
        assert f"Gone from the repository and served no longer: version{plural} {', '.join(removed)}" in told
        assert "version 5: " in told
        assert answering in told
        for version in removed:
            (aside / version).rename(folder / version)
        aside.rmdir()


def test_a_load_while_the_folder_is_away_says_that_of_the_folder_and_once(write, tmp_path: Path) -> None:
    for version in (1, 2):
        write(f"release/tiny/{version}", version)
    link = tmp_path / "current"
    link.symlink_to(tmp_path / "release")

    async def main() -> None:
        async with serving(settings_for(link, allow_repository_changes=True)) as server:
            (tmp_path / "release").rename(tmp_path / "elsewhere")
            answer = await server.ask("tiny/load")
            told = answer.json()["error"]
            assert answer.status_code == 400
            assert told.count("the model repository cannot be read (No such file or directory)") == 1
            assert "what was loaded goes on answering. Answering now: versions 1, 2" in told
            assert "expected a bundle" not in told
            assert {state for state, _ in (await server.index()).values()} == {"READY"}
            assert (await server.scale(), await server.scale("tiny/versions/1")) == (2, 1)
            unknown = await server.ask("new/load")
            assert unknown.status_code == 404
            assert "the model repository cannot be read" in unknown.json()["error"]
            (tmp_path / "elsewhere").rename(tmp_path / "release")
            assert (await server.ask("tiny/load")).json() == {}
            assert set((await server.index()).values()) == {("READY", "")}

    run(main)


# --- ready ---


def test_a_server_is_ready_when_what_should_be_served_is(write, tmp_path: Path, serve_in_a_thread) -> None:
    """Over real sockets: HTTP, gRPC and the health check of containers say the same."""
    grpc = pytest.importorskip("grpc")
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    from serving.health_check import reason_against

    def told(url: str, application: Application) -> set[bool]:
        with grpc.insecure_channel(f"127.0.0.1:{application.grpc_port}") as channel:
            check = health_pb2_grpc.HealthStub(channel).Check
            names = ("", "inference.GRPCInferenceService")
            health = [check(health_pb2.HealthCheckRequest(service=name)).status for name in names]
        assert httpx.get(f"{url}/v2/health/live").json() == {"live": True}
        ready = httpx.get(f"{url}/v2/health/ready")
        serving = [status == health_pb2.HealthCheckResponse.SERVING for status in health]
        return {*serving, ready.status_code == 200, ready.json()["ready"], reason_against(str(ready.url)) is None}

    def is_ready(folder: Path, **changes: Any) -> bool:
        application = build(settings_for(folder, grpc_port=0, **changes))
        with serve_in_a_thread(application) as url:
            [ready] = told(url, application)
        return ready

    (tmp_path / "empty").mkdir()
    damaged = write("damaged/tiny", 1)
    truncate(damaged)
    assert is_ready(write("whole/tiny", 1).parent) is True
    for folder in (tmp_path / "empty", damaged.parent):
        assert is_ready(folder) is False
        assert is_ready(folder, allow_empty=True) is True


def test_what_a_client_unloaded_on_purpose_is_not_missing(write) -> None:
    folder = write("repository/tiny", 1).parent

    async def main() -> None:
        async with serving(settings_for(folder, allow_repository_changes=True)) as server:
            assert (await server.ask("tiny/unload")).status_code == 200
            assert await server.ready() is True, "who unloads the last model can still reach the server to load it"
            assert (await server.client.get("/v2/models/tiny/ready")).status_code == 404

    run(main)


def test_what_comes_later_and_cannot_be_loaded_does_not_stop_what_is_served(write) -> None:
    folder = write("repository/a", 1).parent

    async def main() -> None:
        async with serving(settings_for(folder, allow_repository_changes=True)) as server:
            truncate(write("repository/b", 2))
            await server.refresh(2)
            assert (await server.index())["b", "1"][0] == "UNAVAILABLE"
            assert await server.ready() is True
            write("repository/c", 3)
            await server.refresh()
            assert (await server.ask("c/unload")).status_code == 200
            assert await server.ready() is True
            shutil.rmtree(folder / "c")
            await server.refresh(2)
            shutil.rmtree(folder / "a")
            await server.refresh(2)
            assert await server.ready() is False, "nothing is served any more"
        async with serving(settings_for(folder)) as server:
            assert await server.ready() is False
            write("repository/b", 2)
            await server.refresh()
            assert await server.ready() is True

    run(main)


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"[]", 400),
        (b"{", 400),
        (b'{"parameters": {"config": "{}"}}', 400),
        (b"[" * 10_000, 400),
        (b"[" * 100_000, 413),
    ],
)
def test_a_model_is_loaded_as_the_operator_configured_it(write, content: bytes, status: int) -> None:
    folder = write("repository/tiny", 1).parent

    async def main() -> None:
        async with serving(settings_for(folder, allow_repository_changes=True)) as server:
            answer = await server.client.post("/v2/repository/models/tiny/load", content=content)
            assert answer.status_code == status
            assert await server.scale() == 1

    run(main)


# --- requests while models change ---


def test_requests_in_flight_while_a_model_is_loaded_again_are_all_answered_by_the_one_or_the_other(
    write, serve_in_a_thread
) -> None:
    """Over real sockets: bodies whole and in two pieces, so that a model is replaced between head and body too."""
    folder = write("repository/tiny", 1)
    application = build(settings_for(folder.parent, reload_seconds=0.02, threads=2))
    stop, found, failures = threading.Event(), [], []

    def ask(host: str, *, slowly: bool) -> None:
        connection = http.client.HTTPConnection(host, timeout=10)
        while not stop.is_set():
            connection.putrequest("POST", "/v2/models/tiny/infer")
            connection.putheader("Inference-Header-Content-Length", "0")
            connection.putheader("Content-Length", str(IMAGE.nbytes))
            if slowly:
                connection.endheaders()
                time.sleep(0.03)
                connection.send(IMAGE.tobytes())
            else:
                connection.endheaders(IMAGE.tobytes())
            answer = connection.getresponse()
            content = answer.read()
            if answer.status == 200:
                found.append(scale_of(content, answer.headers))
            else:
                failures.append(content)
        connection.close()

    with serve_in_a_thread(application) as url:
        host = url.removeprefix("http://")
        clients = [threading.Thread(target=ask, args=(host,), kwargs={"slowly": n % 2 == 1}) for n in range(6)]
        for client in clients:
            client.start()
        for scale in range(2, 8):
            write("repository/tiny", scale)
            deadline = time.monotonic() + 10
            while scale not in found[-20:] and time.monotonic() < deadline:
                time.sleep(0.005)
        stop.set()
        for client in clients:
            client.join(10)
        metrics = httpx.get(f"{url}/metrics").text
    assert failures == []
    assert set(found) == {1, 2, 3, 4, 5, 6, 7}
    assert application.budget.held == 0
    counted = [line for line in metrics.splitlines() if line.startswith("manygates_requests_total{")]
    assert len(counted) == 1
    assert float(counted[0].split()[-1]) == len(found), "a replaced model's counts go on"


def test_what_a_replaced_or_unloaded_model_has_taken_is_answered(card, load_model) -> None:
    opened, entered = threading.Event(), threading.Event()

    class Slow(Predictor):
        def __init__(self, mark: float) -> None:
            self.mark = mark

        def predict(self, images: np.ndarray, *_: Any, **__: Any) -> Any:
            entered.set()
            assert opened.wait(10)
            return Prediction(np.full((len(images), 3), self.mark, np.float32), np.zeros((len(images), 3), np.float32))

    async def main() -> None:
        service = Service([Model(card=card, mode="single", predictor=Slow(1))], Settings(threads=1, max_batch=1))
        service.start()
        old = service.find("tiny")
        tasks = [asyncio.create_task(service.predict(old, IMAGE)) for _ in range(4)]
        while not entered.is_set():
            await asyncio.sleep(0.001)
        service.put(Model(card=card, mode="single", predictor=Slow(2)))
        new = service.find("tiny")
        assert old.latest is new
        assert new.latest is new
        tasks += [asyncio.create_task(service.predict(new, IMAGE)) for _ in range(4)]
        await asyncio.sleep(0)
        service.drop("tiny")
        opened.set()
        answers = [(await task).probabilities[0, 0] for task in tasks]
        assert answers == [1] * 4 + [2] * 4
        await service.stop()
        assert not service._closing

    run(main)


def test_a_client_that_gives_up_stops_no_load_in_the_middle(write, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write("repository/tiny", 1).parent
    entered, opened = threading.Event(), threading.Event()
    load = repository.load

    def slow(*arguments: Any, **options: Any) -> Any:
        entered.set()
        assert opened.wait(10)
        return load(*arguments, **options)

    async def main() -> None:
        async with serving(settings_for(folder, allow_repository_changes=True)) as server:
            assert (await server.ask("tiny/unload")).status_code == 200
            monkeypatch.setattr(repository, "load", slow)
            service, known = server.application.service, server.application.repository
            task = asyncio.create_task(known.load(service, "tiny"))
            while not entered.is_set():
                await asyncio.sleep(0.001)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert (await server.index())["tiny", "1"][0] == "UNAVAILABLE", "what is not served yet is not READY"
            unloading = asyncio.create_task(server.ask("tiny/unload"))
            await asyncio.sleep(0.05)
            assert not unloading.done(), "one change at a time"
            opened.set()
            assert (await unloading).status_code == 200, "it was served by then"
            assert (await server.index())["tiny", "1"][0] == "UNAVAILABLE"

    run(main)


def test_watching_goes_on_after_a_look_that_failed(write, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    folder = write("repository/tiny", 1).parent
    looks = []
    refresh = Repository.refresh

    async def sometimes(self: Repository, service: Service) -> None:
        looks.append(len(looks))
        if len(looks) == 1:
            raise RuntimeError("a defect")
        await refresh(self, service)

    monkeypatch.setattr(Repository, "refresh", sometimes)

    async def main() -> None:
        async with serving(settings_for(folder, reload_seconds=0.01)) as server:
            write("repository/tiny", 2)
            while await server.scale() == 1:
                await asyncio.sleep(0.01)
            assert await server.scale() == 2

    run(main)
    assert "looking for changed bundles failed" in caplog.text


def test_a_card_that_is_no_card_says_so_without_where_it_lies(write, tmp_path: Path) -> None:
    folder = write("tiny", 1)
    card = json.loads((folder / "card.json").read_text())
    (folder / "card.json").write_text(json.dumps({**card, "schema": 999}))
    with pytest.raises(BundleError):
        build(Settings(threads=1, models=(f"local-dir:{folder}",)))
