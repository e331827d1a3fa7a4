"""The Open Inference Protocol over gRPC, and gRPC's own health protocol, on the event loop of everything else."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

import grpc

from serving.grpc.calls import Calls
from serving.listener import address_of
from serving.operations.log import logger
from serving.operations.settings import Settings
from serving.operations.tls import pems
from serving.protocol.admission import Admission, ByteBudget
from serving.scheduling.administration import Administration
from serving.scheduling.service import Service
from zoo.errors import BadInput

_MOST: Final = 2**31 - 1  # a gRPC option is a 32-bit integer


@asynccontextmanager
async def running(
    service: Service, admission: Admission, budget: ByteBudget, administration: Administration, tracer: Any = None
) -> AsyncIterator[int]:
    """Serve gRPC inside the block, on the address of HTTP and the settings' port for gRPC; yields the port.

    On leaving it no new calls are taken, and those in flight have what is left of the time to drain. Without a `tracer`
    of OpenTelemetry nothing is traced.

    Raises:
        BadInput: if the address cannot be used, or a file of the settings for TLS.
    """
    settings = service.settings
    server = grpc.aio.server(options=_options(settings), maximum_concurrent_rpcs=settings.max_connections)
    calls = Calls(service, admission, budget, administration, tracer)
    server.add_generic_rpc_handlers((calls,))
    port = _bind(server, settings)
    await server.start()
    logger.info("gRPC at %s", address_of(settings.host, port))
    try:
        yield port
    finally:
        await calls.health.enter_graceful_shutdown()
        await calls.refuse_more()
        calls.stopping.set()
        stopping = asyncio.ensure_future(server.stop(grace=service.time_to_drain))
        hurried = asyncio.ensure_future(service.hurried.wait())
        await asyncio.wait({stopping, hurried}, return_when=asyncio.FIRST_COMPLETED)
        if not stopping.done():
            await server.stop(grace=0)
        hurried.cancel()
        await stopping


def _options(settings: Settings) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", min(settings.max_body_bytes, _MOST)),
        ("grpc.max_send_message_length", -1),
        ("grpc.max_concurrent_streams", min(settings.max_connections, _MOST)),
        ("grpc.so_reuseport", 0),  # a port in use is an error, not a second server behind it
        ("grpc.server_handshake_timeout_ms", _milliseconds(settings.header_timeout)),
        ("grpc.max_connection_idle_ms", _milliseconds(settings.keep_alive_timeout)),
        # find clients that vanished, and bear those that look after us as often
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ]


def _milliseconds(seconds: float) -> int:
    return max(1, min(int(1000 * seconds), _MOST))


def _bind(server: grpc.aio.Server, settings: Settings) -> int:
    """Listen, and return the port."""
    address = address_of(settings.host, settings.grpc_port)
    files = pems(settings)
    try:
        if files is None:
            return int(server.add_insecure_port(address))
        key, certificate, client_ca = files
        credentials = grpc.ssl_server_credentials([(key, certificate)], client_ca, client_ca is not None)
        return int(server.add_secure_port(address, credentials))
    except RuntimeError as error:
        raise BadInput(
            f"cannot serve gRPC on {address}; choose another port with --grpc-port, or stop what uses it"
        ) from error
