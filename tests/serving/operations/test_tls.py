import asyncio
import datetime
import socket
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trustme
import uvicorn

from serving.operations.settings import Settings
from serving.operations.tls import pems, renew, ssl_context
from zoo.errors import BadInput

pytestmark = pytest.mark.integration  # its fixtures start servers in ways that the code does not show

NOW = datetime.datetime.now(datetime.UTC).replace(tzinfo=None)
DAY = datetime.timedelta(days=1)


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def another_authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def tls(tmp_path: Path, authority: trustme.CA) -> Callable[..., Settings]:
    """Return a function to settings with a fresh certificate for localhost."""

    def write(name: str = "server", *, client_ca: trustme.CA | None = None, **how: Any) -> Settings:
        issued = authority.issue_cert("localhost", **how)
        issued.private_key_pem.write_to_path(tmp_path / f"{name}.key")
        for place, pem in enumerate(issued.cert_chain_pems):
            pem.write_to_path(tmp_path / f"{name}.pem", append=place > 0)
        if client_ca is not None:
            client_ca.cert_pem.write_to_path(tmp_path / "clients.pem")
        return Settings(
            tls_certificate=str(tmp_path / f"{name}.pem"),
            tls_key=str(tmp_path / f"{name}.key"),
            tls_client_ca="" if client_ca is None else str(tmp_path / "clients.pem"),
        )

    return write


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        writer.write(b"heard " + await reader.readline())
        await writer.drain()
    except (OSError, ssl.SSLError):
        pass  # the client did not like us
    finally:
        writer.close()


def talk(context: ssl.SSLContext | None, client: ssl.SSLContext, *, before: Callable[[], None] = lambda: None) -> Any:
    """Return what a server with that context answers a client with the other, and the protocol they agreed on."""

    async def both() -> tuple[bytes, str, bytes]:
        server = await asyncio.start_server(_answer, "127.0.0.1", 0, ssl=context)
        async with server:
            before()
            port = server.sockets[0].getsockname()[1]
            reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=client, server_hostname="localhost")
            try:
                writer.write(b"you\n")
                line = await reader.readline()
                encrypted = writer.get_extra_info("ssl_object")
                return line, encrypted.version(), encrypted.getpeercert(binary_form=True)
            finally:
                writer.close()

    return asyncio.run(both())


def trusting(authority: trustme.CA, certificate: trustme.LeafCert | None = None) -> ssl.SSLContext:
    client = ssl.create_default_context()
    authority.configure_trust(client)
    if certificate is not None:
        certificate.configure_cert(client)
    return client


def test_no_certificate_is_no_tls() -> None:
    assert ssl_context(Settings()) is None
    assert pems(Settings()) is None


def test_a_client_that_trusts_the_authority_is_answered(tls: Any, authority: trustme.CA) -> None:
    line, version, _ = talk(ssl_context(tls()), trusting(authority))
    assert (line, version) == (b"heard you\n", "TLSv1.3")


def test_a_client_that_trusts_another_authority_hangs_up(tls: Any, another_authority: trustme.CA) -> None:
    with pytest.raises(ssl.SSLCertVerificationError):
        talk(ssl_context(tls()), trusting(another_authority))


def test_tls_begins_at_1_2(tls: Any, authority: trustme.CA) -> None:
    context = ssl_context(tls())
    old = trusting(authority)
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    assert talk(context, old)[:2] == (b"heard you\n", "TLSv1.2")
    assert context is not None
    assert context.minimum_version == ssl.TLSVersion.TLSv1_2


def test_with_a_client_authority_only_its_clients_are_answered(
    tls: Any, authority: trustme.CA, another_authority: trustme.CA
) -> None:
    context = ssl_context(tls(client_ca=authority))
    known = authority.issue_cert("client@example.org")
    assert talk(context, trusting(authority, known))[0] == b"heard you\n"
    stranger = another_authority.issue_cert("client@example.org")
    for refused in (trusting(authority), trusting(authority, stranger)):
        refused.maximum_version = ssl.TLSVersion.TLSv1_2  # which tells the client during the handshake
        with pytest.raises((ssl.SSLError, ConnectionError)):
            talk(context, refused)


def test_a_renewed_certificate_is_used_from_the_next_connection_on(tls: Any, authority: trustme.CA) -> None:
    settings = tls()
    context = ssl_context(settings)
    assert context is not None
    first = talk(context, trusting(authority))[2]
    second = talk(context, trusting(authority), before=lambda: renew(context, tls()))[2]
    assert first != second
    Path(settings.tls_certificate).write_text("spoiled")
    with pytest.raises(BadInput, match="cannot be used"):
        renew(context, settings)
    assert talk(context, trusting(authority))[2] == second


def test_grpc_gets_the_same_files(tls: Any, authority: trustme.CA) -> None:
    settings = tls(client_ca=authority)
    found = pems(settings)
    assert found is not None
    assert found.key == Path(settings.tls_key).read_bytes()
    assert found.certificate == Path(settings.tls_certificate).read_bytes()
    assert found.client_ca == Path(settings.tls_client_ca).read_bytes()
    plain = pems(tls())
    assert plain is not None
    assert plain.client_ca is None


@pytest.mark.parametrize("missing", ["tls_certificate", "tls_key", "tls_client_ca"])
def test_a_missing_file_is_named(tls: Any, authority: trustme.CA, missing: str) -> None:
    settings = tls(client_ca=authority)
    Path(getattr(settings, missing)).unlink()
    with pytest.raises(BadInput, match=rf"{missing} is '.*', which cannot be read \(No such file"):
        ssl_context(settings)


def test_a_key_of_another_certificate_is_refused(tls: Any) -> None:
    one, other = tls("one"), tls("other")
    with pytest.raises(BadInput, match="which is not the key of the certificate"):
        ssl_context(Settings(tls_certificate=one.tls_certificate, tls_key=other.tls_key))


@pytest.mark.parametrize(
    ("dates", "said"),
    [
        ({"not_before": NOW - 9 * DAY, "not_after": NOW - DAY}, "certificate has expired"),
        ({"not_before": NOW + DAY, "not_after": NOW + 9 * DAY}, "certificate is not yet valid"),
    ],
)
def test_a_certificate_out_of_date_is_refused(tls: Any, dates: dict[str, Any], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        ssl_context(tls(**dates))


def test_an_encrypted_key_is_refused_without_asking_the_terminal(tls: Any) -> None:
    from cryptography.hazmat.primitives import serialization

    settings = tls()
    key = serialization.load_pem_private_key(Path(settings.tls_key).read_bytes(), None)
    Path(settings.tls_key).write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"passphrase"),
        )
    )
    with pytest.raises(BadInput, match="which is encrypted; `openssl pkey"):
        ssl_context(settings)


@pytest.mark.parametrize("content", [b"", b"no PEM", b"\xff\x00"])
@pytest.mark.parametrize("spoiled", ["tls_certificate", "tls_key", "tls_client_ca"])
def test_a_file_that_is_no_pem_is_refused(tls: Any, authority: trustme.CA, spoiled: str, content: bytes) -> None:
    settings = tls(client_ca=authority)
    Path(getattr(settings, spoiled)).write_bytes(content)
    with pytest.raises(BadInput, match=rf"{spoiled}.* cannot be used .*-----BEGIN"):
        ssl_context(settings)


def test_a_clients_certificate_is_no_authority(tls: Any, authority: trustme.CA) -> None:
    settings = tls(client_ca=authority)
    authority.issue_cert("client@example.org").cert_chain_pems[0].write_to_path(settings.tls_client_ca)
    with pytest.raises(BadInput, match="holds no authority's certificate"):
        ssl_context(settings)


def test_uvicorn_serves_with_the_context(tls: Any, authority: trustme.CA) -> None:
    async def application(scope: Any, receive: Any, send: Any) -> None:
        assert scope["scheme"] == "https"
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def both() -> bytes:
        config = uvicorn.Config(application, lifespan="off", log_config=None)
        config.load()
        config.ssl = ssl_context(tls())
        server = uvicorn.Server(config)
        server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
        listener = socket.create_server(("127.0.0.1", 0))
        listener.setblocking(False)
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        reader, writer = await asyncio.open_connection(
            *listener.getsockname(), ssl=trusting(authority), server_hostname="localhost"
        )
        writer.write(b"GET / HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
        line = await reader.readline()
        writer.close()
        server.should_exit = True
        await serving
        return line

    assert asyncio.run(both()) == b"HTTP/1.1 204 No Content\r\n"
