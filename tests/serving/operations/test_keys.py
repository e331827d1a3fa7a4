import asyncio
import hmac
import logging
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from serving.errors import RequestError
from serving.http.app import Application
from serving.operations.keys import Keys
from zoo.errors import BadInput

ALICE, BOB, CAROL = "alice-0123456789abcdef", "bob-0123456789abcdef==", "carol~0123456789+/abcdef"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "keys"
    rewrite(file, f"# ours\n\nalice:{ALICE}\n  {BOB}  \ncarol : {CAROL} : eio, other\n")
    return file


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a clock that one turns by hand."""

    class Clock:
        now = 1000.0

    monkeypatch.setattr("serving.operations.keys.time.monotonic", lambda: Clock.now)
    return Clock


def rewrite(file: Path, content: str) -> None:
    """Replace a file as careful programs do, so that its inode changes even where its time and size do not."""
    fresh = file.with_suffix(".new")
    fresh.write_text(content, encoding="utf-8")
    fresh.chmod(0o600)
    fresh.replace(file)


def refused(keys: Keys, *request: Any) -> RequestError:
    with pytest.raises(RequestError) as refusal:
        keys.check(*request)
    assert not any(secret in str(refusal.value) for secret in (ALICE, BOB, CAROL))
    return refusal.value


def test_a_key_is_known_by_its_name_in_either_header(file: Path) -> None:
    keys = Keys.from_file(file)
    assert keys.check(b"Bearer " + ALICE.encode(), None) == "alice"
    assert keys.check(b"bearer  " + ALICE.encode() + b" ", None, "eio") == "alice"
    assert keys.check(None, BOB.encode(), "anything") == "line-4"
    assert keys.check(b"Basic dXNlcjpwYXNz", CAROL.encode()) == "carol"


def test_a_request_without_a_key_is_told_how_to_send_one(file: Path) -> None:
    keys = Keys.from_file(file)
    for authorization, api_key in (
        (None, None),
        (b"", b""),
        (b"Basic dXNlcjpwYXNz", None),
        (b"Bearer", None),
        (ALICE.encode(), None),
    ):
        error = refused(keys, authorization, api_key)
        assert (error.status, error.reason) == (401, "no_key")
        assert "send Authorization: Bearer KEY, or X-API-Key: KEY" in str(error)
        assert dict(error.headers)[b"www-authenticate"] == b'Bearer realm="manygates"'


@pytest.mark.parametrize(
    "wrong", [ALICE[:-1], ALICE + "x", ALICE.upper(), "alice:" + ALICE, "x", "é" * 20, "\x00" * 20, "a" * 60_000]
)
def test_an_unknown_key_is_refused(file: Path, wrong: str) -> None:
    keys = Keys.from_file(file)
    error = refused(keys, None, wrong.encode())
    assert (error.status, error.reason) == (401, "unknown_key")
    assert b"invalid_token" in dict(error.headers)[b"www-authenticate"]
    assert refused(keys, b"Bearer " + wrong.encode(), None).status == 401


def test_a_key_for_some_models_is_refused_at_others(file: Path) -> None:
    keys = Keys.from_file(file)
    assert keys.check(None, CAROL.encode(), "eio") == keys.check(None, CAROL.encode(), "other") == "carol"
    assert keys.check(None, CAROL.encode(), None) == "carol"
    error = refused(keys, None, CAROL.encode(), "third")
    assert (error.status, error.reason) == (403, "model_not_allowed")
    assert str(error) == "the API key 'carol' is not for 'third', only for eio, other"


def test_every_key_is_compared_in_constant_time(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []

    def compare(one: bytes, other: bytes) -> bool:
        compared.append((len(one), len(other)))
        return hmac_compare(one, other)

    hmac_compare = hmac.compare_digest
    monkeypatch.setattr("serving.operations.keys.hmac.compare_digest", compare)
    keys = Keys.from_file(file)
    keys.check(None, ALICE.encode())
    refused(keys, None, b"nobody")
    assert compared == [(32, 32)] * 6


def test_no_key_is_kept_in_memory(file: Path) -> None:
    keys = Keys.from_file(file)
    assert not any(secret in repr(vars(keys)) for secret in (ALICE, BOB, CAROL))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "holds no key; write one a line"),
        ("# alice:0123456789abcdef\n", "holds no key"),
        ("short", "line 1 .* has a key of 5 characters, expected 16 to 512"),
        ("alice:SECRET0123456789:a:b", "line 1 .* has 3 colons, expected KEY, NAME:KEY or NAME:KEY:MODEL,MODEL"),
        ("a b:SECRET0123456789", "line 1 .* begins with no name"),
        (":SECRET0123456789", "begins with no name"),
        ("alice:SECRET 0123456789", "has a key of 17 characters"),
        ("alice:SECRET0123456789:", "has models that are no names"),
        ("alice:SECRET0123456789:../x", "has models that are no names"),
        ("a:SECRET0123456789\na:SECRET9876543210", "line 2 .* has the name 'a' again"),
        ("a:SECRET0123456789\nb:SECRET0123456789", "line 2 .* has the same key as 'a'"),
        ("SECRET" * 200_000, "has more than 1048576 bytes"),
    ],
)
def test_a_file_that_makes_no_sense_is_refused_without_showing_it(tmp_path: Path, content: str, said: str) -> None:
    rewrite(tmp_path / "keys", content)
    with pytest.raises(BadInput, match=said) as refusal:
        Keys.from_file(tmp_path / "keys")
    assert "SECRET" not in str(refusal.value)


def test_a_file_that_is_not_there_or_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"cannot read the key file .*keys \(No such file"):
        Keys.from_file(tmp_path / "keys")
    (tmp_path / "keys").write_bytes(b"\xff\xfeSECRET")
    with pytest.raises(BadInput, match=r"the key file .* is no text") as refusal:
        Keys.from_file(str(tmp_path / "keys"))
    assert refusal.value.__cause__ is None


def test_a_file_that_others_may_read_is_warned_about(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "manygates.serving"):
        Keys.from_file(file)
        assert caplog.messages == []
        for mode in (0o640, 0o604):
            file.chmod(mode)
            Keys.from_file(file)
    assert caplog.messages == [f"others than its owner may read the key file {file}; chmod 600 it"] * 2


def test_a_changed_file_is_read_again_within_a_second(file: Path, clock: Any) -> None:
    keys = Keys.from_file(file)
    before = keys.generation
    rewrite(file, f"dora:{BOB}\n")
    assert keys.check(None, ALICE.encode()) == "alice"
    clock.now += 1.1
    assert refused(keys, None, ALICE.encode()).reason == "unknown_key"
    assert keys.check(None, BOB.encode()) == "dora"
    assert keys.generation == before + 1


def test_who_only_watches_the_generation_sees_a_change_too(file: Path, clock: Any) -> None:
    keys = Keys.from_file(file)
    before = keys.generation
    rewrite(file, f"dora:{BOB}\n")
    clock.now += 1.1
    assert keys.generation == before + 1


def test_the_file_is_looked_at_once_a_second(file: Path, clock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = Keys.from_file(file)
    looked = []
    stat = Path.stat

    def counting(path: Path, **options: Any) -> Any:
        looked.append(path)
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", counting)
    for _ in range(30):
        keys.check(None, ALICE.encode())
        clock.now += 0.1
    monkeypatch.undo()
    assert looked.count(file) in (2, 3)


def test_a_broken_or_missing_file_leaves_the_keys_and_is_logged_once(
    file: Path, clock: Any, caplog: pytest.LogCaptureFixture
) -> None:
    keys = Keys.from_file(file)
    before = keys.generation
    for spoil in (lambda: rewrite(file, "short\n"), file.unlink):
        caplog.clear()
        spoil()
        for _ in range(3):
            clock.now += 1.1
            assert keys.check(None, ALICE.encode()) == "alice"
        (said,) = caplog.messages
        assert said.endswith("; the 3 keys from before stay")
    assert keys.generation == before
    rewrite(file, f"dora:{BOB}\n")
    clock.now += 1.1
    assert keys.check(None, BOB.encode()) == "dora"


def test_a_reload_reads_even_a_file_that_looks_the_same(file: Path) -> None:
    keys = Keys.from_file(file)
    before, found = keys.generation, file.stat()
    assert keys.reload()
    assert keys.generation == before
    content = file.read_text().replace(ALICE, ALICE[::-1])
    with file.open("r+") as opened:
        opened.write(content)
    os.utime(file, ns=(found.st_atime_ns, found.st_mtime_ns))
    assert keys.reload()
    assert keys.generation == before + 1
    assert keys.check(None, ALICE[::-1].encode()) == "alice"
    rewrite(file, "short")
    assert not keys.reload()


@pytest.fixture
def administered(tiny_application: Callable[..., Application], tmp_path: Path) -> Application:
    """A server whose models only Alice may load and unload; Bob may ask it everything else."""
    rewrite(tmp_path / "keys", f"bob:{BOB}\n")
    rewrite(tmp_path / "administrators", f"alice:{ALICE}\n")
    files = {"api_keys_file": str(tmp_path / "keys"), "admin_keys_file": str(tmp_path / "administrators")}
    return tiny_application("single", allow_repository_changes=True, **files)


CHANGES = [f"/v2/repository/models/tiny/{verb}" for verb in ("unload", "load")]
# none of these is the path of a change, and the router must not think so either
ALMOST_CHANGES = [
    f"{path}{more}" for path in CHANGES for more in ("%0A", "%0a", "%0D%0A", "%00", "%7F", "%0A/", "/", "//")
]
ALMOST_CHANGES += ["/v2/repository/models/tiny%0A/unload", "/v2%0A/repository/models/tiny/unload", "/%0A"]


def test_only_an_administrators_key_changes_models_however_the_path_is_written(administered: Application) -> None:
    async def main() -> None:
        transport = httpx.ASGITransport(administered)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client, administered.running():
            for key in (BOB, ALICE):
                for path in ALMOST_CHANGES:
                    answer = await client.post(path, headers={"x-api-key": key})
                    controlled = any(code in path for code in ("%0", "%7F"))
                    assert answer.status_code in ((400,) if controlled else (401, 404)), path
                    assert not controlled or "holds a control character" in answer.json()["error"]
                    assert administered.service.names == ["tiny"]
            for path in CHANGES:
                assert (await client.post(path, headers={"x-api-key": BOB})).status_code == 401
            for path in CHANGES:
                assert (await client.post(path, headers={"x-api-key": ALICE})).status_code == 200

    asyncio.run(main())


def test_neither_do_paths_that_no_library_would_send(
    administered: Application, serve_in_a_thread: Callable[[Application], Any]
) -> None:
    with serve_in_a_thread(administered) as url:
        host, _, port = url.removeprefix("http://").partition(":")

        def status(path: str, key: str) -> int:
            with socket.create_connection((host, int(port)), timeout=10) as client:
                head = f"POST {path} HTTP/1.1\r\nHost: x\r\nX-API-Key: {key}\r\nContent-Length: 0\r\nConnection: close"
                client.sendall(f"{head}\r\n\r\n".encode("latin-1"))
                return int(client.makefile("rb").readline().split()[1])

        raw = [CHANGES[0] + character for character in ("\x01", "\x0b", "\x7f", "\n", "\r")]
        for path in [*ALMOST_CHANGES, *raw, "http://x" + ALMOST_CHANGES[0], CHANGES[0] + "?%0A", CHANGES[0] + "%3F"]:
            assert status(path, BOB) in (400, 401, 404), path
            assert administered.service.names == ["tiny"]
        assert status(CHANGES[0] + "?%0A", ALICE) == 200
        assert administered.service.names == []


def test_a_request_refused_for_its_path_is_answered_and_logged_like_any_other(
    tiny_application: Callable[..., Application], caplog: pytest.LogCaptureFixture
) -> None:
    application = tiny_application("single", log_requests=True, cors_origins=("http://page",))

    async def main() -> None:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(application), base_url="http://server") as client:
            answer = await client.get("/v2/health/live%0A", headers={"origin": "http://page", "x-request-id": "7"})
            assert answer.status_code == 400
            assert answer.json() == {
                "error": r"the path '/v2/health/live\n' holds a control character; no path here has one, see /"
            }
            assert answer.headers["x-request-id"] == "7"
            assert answer.headers["access-control-allow-origin"] == "http://page"

    with caplog.at_level(logging.INFO, "manygates.access"):
        asyncio.run(main())
    (record,) = [record for record in caplog.records if record.name == "manygates.access"]
    assert record.access["status"] == 400  # type: ignore[attr-defined]
    assert b'reason="bad_request"' in application.metrics.text()
