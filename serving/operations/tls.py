"""TLS from the settings: one context for HTTP, the same files for gRPC, and errors that say what is wrong with them."""

import os
import ssl
from pathlib import Path
from typing import NamedTuple

from serving.operations.settings import Settings
from zoo.errors import BadInput


class Pems(NamedTuple):
    """The contents of the files, as gRPC takes them."""

    key: bytes
    certificate: bytes
    client_ca: bytes | None


def ssl_context(settings: Settings) -> ssl.SSLContext | None:
    """Return what a listening socket is wrapped in; None where the settings name no certificate.

    It takes TLS 1.2 or later, and asks for clients' certificates if so set. The server's is tried on a handshake in
    memory before it is used.

    Raises:
        BadInput: if a file cannot be read or is no PEM, if the key is another's or is encrypted, or if the certificate
            has expired, is not valid yet, or is not for servers.
    """
    if not settings.tls_certificate:
        return None
    _pems(settings)  # its errors name the setting
    _rehearse(settings)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION | ssl.OP_CIPHER_SERVER_PREFERENCE
    context.set_alpn_protocols(["http/1.1"])
    _load_chain(context, settings)
    if settings.tls_client_ca:
        _load_client_ca(context, settings.tls_client_ca)
    return context


def renew(context: ssl.SSLContext, settings: Settings) -> None:
    """Read the certificate and its key again, not who signs clients. Errors, as of `ssl_context`, change nothing."""
    _rehearse(settings)
    _load_chain(context, settings)


def pems(settings: Settings) -> Pems | None:
    """Return the contents of the files, checked as `ssl_context` does; None where the settings name no certificate."""
    return None if ssl_context(settings) is None else _pems(settings)


def _pems(settings: Settings) -> Pems:
    certificate = _read("tls_certificate", settings.tls_certificate)
    client_ca = _read("tls_client_ca", settings.tls_client_ca) if settings.tls_client_ca else None
    return Pems(_read("tls_key", settings.tls_key), certificate, client_ca)


def _read(name: str, file: str) -> bytes:
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise BadInput(f"{name} is {file!r}, which cannot be read ({error.strerror or error})") from error


def _load_chain(context: ssl.SSLContext, settings: Settings) -> None:
    """Load the certificate and its key; without an answer ready OpenSSL would ask the terminal for a passphrase."""

    def encrypted() -> str:
        raise BadInput(
            f"tls_key is {settings.tls_key!r}, which is encrypted; `openssl pkey -in {settings.tls_key} -out FILE` "
            "writes one that is not, for only the server to read"
        )

    try:
        context.load_cert_chain(settings.tls_certificate, settings.tls_key, password=encrypted)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise BadInput(
                f"tls_key is {settings.tls_key!r}, which is not the key of the certificate "
                f"{settings.tls_certificate!r}; the server's own certificate comes first in its file, and the two are "
                "made together"
            ) from error
        raise BadInput(
            f"tls_certificate {settings.tls_certificate!r} and tls_key {settings.tls_key!r} cannot be used "
            f"({error.reason or error}), expected PEM files: -----BEGIN CERTIFICATE-----, -----BEGIN PRIVATE KEY-----"
        ) from error
    except OSError as error:
        named = os.fspath(error.filename) if error.filename else f"{settings.tls_certificate}, {settings.tls_key}"
        raise BadInput(f"{named} cannot be read ({error.strerror or error})") from error


def _load_client_ca(context: ssl.SSLContext, file: str) -> None:
    context.verify_mode = ssl.CERT_REQUIRED
    try:
        context.load_verify_locations(cafile=file)
    except ssl.SSLError as error:
        raise BadInput(
            f"tls_client_ca is {file!r}, which cannot be used ({error.reason or error}), expected a PEM file: "
            "-----BEGIN CERTIFICATE-----"
        ) from error
    if not context.cert_store_stats()["x509_ca"]:
        raise BadInput(
            f"tls_client_ca is {file!r}, which holds no authority's certificate; name the one that signs, not the ones "
            "that clients have"
        )


def _rehearse(settings: Settings) -> None:
    """Connect to ourselves, in memory, as a client who trusts this very certificate.

    Loading a certificate reads neither its dates nor its purpose, and `ssl` has no other way to ask for them.
    """
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    _load_chain(server, settings)
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    client.verify_flags &= ~ssl.VERIFY_X509_STRICT
    client.load_verify_locations(cafile=settings.tls_certificate)
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [server.wrap_bio(to_server, to_client, server_side=True), client.wrap_bio(to_client, to_server)]
    try:
        for _ in range(8):  # a handshake takes two or three turns
            for end in list(ends):
                try:
                    end.do_handshake()
                    ends.remove(end)
                except ssl.SSLWantReadError:
                    continue
    except ssl.SSLError as error:
        reason = getattr(error, "verify_message", error.reason) or error
        raise BadInput(
            f"no client can connect with tls_certificate {settings.tls_certificate!r} ({reason}); renew it, with an EC "
            "or a 2048-bit RSA key"
        ) from error
