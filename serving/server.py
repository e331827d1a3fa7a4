"""The server process: sockets, signals, start and stop around the application."""

import asyncio
import functools
import logging
import os
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager
from types import FrameType

import uvicorn

from serving.http.app import Application
from serving.http.bounded import SPARE_CONNECTIONS
from serving.http.connection import connections_of
from serving.http.handshakes import limit_handshakes
from serving.listener import allow_open_files, bind, url_of
from serving.operations import log
from serving.operations.log import logger
from serving.operations.settings import Settings
from serving.operations.tls import renew, ssl_context
from serving.operations.tracing import make_tracer
from serving.scheduling.repository import Repository, described
from serving.scheduling.service import Model
from zoo.errors import BadInput

_SWITCH_SECONDS = 0.0005  # a worker with a finished batch would else wait 5 ms for the event loop to yield
_OTHER_FILES = 128  # what is open besides connections: libraries, the log, the event loop, a model being loaded


def serve(settings: Settings) -> None:
    """Serve models until SIGTERM or Ctrl-C; returns when the last request is answered.

    Raises:
        BadInput: if the address cannot be used, a model lacks the mode or the exit, or a setting makes no sense.
        UnknownName: for a model or mode that does not exist.
        BundleError: if a bundle is damaged.
    """
    with _stopped_by_signals():
        _serve(settings)


def build(settings: Settings) -> Application:
    """Load the models and return the ASGI application, whose lifespan starts and ends its work; errors as `serve`."""
    # what Pillow thinks of files that clients send is answered to them; the log would fill with it
    warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
    repository = Repository(settings)
    application = compose(repository.load_all(), settings, repository)
    if settings.demo:
        _mount_demo(application, [model.source for model in settings.model_settings])
    return application


def compose(models: Sequence[Model], settings: Settings, repository: Repository | None = None) -> Application:
    """Return the application of some models, with a tracer and gRPC if wanted; BadInput if a library is missing."""
    grpc = _grpc_beside if settings.grpc_port >= 0 else None
    return Application(models, settings, repository, tracer=make_tracer(settings), grpc=grpc)


def _grpc_beside(application: Application) -> AbstractAsyncContextManager[int]:
    try:
        from serving.grpc import server as grpc_server  # few need its libraries
    except ModuleNotFoundError as error:
        raise BadInput(f"gRPC needs {error.name!r}; install it with `pip install 'manygates[serve]'`") from error
    ours = application
    return grpc_server.running(ours.service, ours.admission, ours.budget, ours.administration, ours.tracer)


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """End the block on SIGTERM or Ctrl-C, as long as nothing in it has handlers of its own.

    Without this SIGTERM would leave a traceback while a model is loaded, and do nothing at all in a container's first
    process.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    before = {each: signal.signal(each, signal.default_int_handler) for each in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    except KeyboardInterrupt:
        print("manygates was stopped before it served anything", file=sys.stderr, flush=True)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _serve(settings: Settings) -> None:
    protocols = 1 if settings.grpc_port < 0 else 2
    allow_open_files(protocols * settings.max_connections + SPARE_CONNECTIONS + _OTHER_FILES)
    log.configure(settings.log_format, settings.log_level)
    takes_signals = hasattr(signal, "SIGHUP") and threading.current_thread() is threading.main_thread()
    if takes_signals:  # it would end the process; what it asks to read again is about to be read
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    listener = bind(settings.host, settings.port)  # before loading: a port in use should not cost the time to load
    sys.setswitchinterval(_SWITCH_SECONDS)
    try:
        if settings.grpc_port > 0:
            # only a trial: gRPC takes no sockets that are bound already
            bind(settings.host, settings.grpc_port, "--grpc-port").close()
        ssl_context(settings)  # before loading as well: a wrong file should not cost the time to load
        application = build(settings)
        server = Server(application)
    except BaseException:
        listener.close()
        raise
    names = ", ".join(application.service.names) or "nothing yet"
    url = url_of(listener, "https" if settings.tls_certificate else "http")
    if takes_signals:
        signal.signal(signal.SIGHUP, server.handle_hang_up)
    if settings.log_format == "json":
        logger.info("manygates serves %s at %s", names, url)
    else:
        print(f"manygates serves {names} at {url} (Ctrl-C stops)", file=sys.stderr, flush=True)
    _log_models(application)
    if missing := application.repository.missing() if application.repository else "":
        logger.warning("not ready: %s", missing)
    server.run(sockets=[listener])
    if application.stuck and threading.current_thread() is threading.main_thread():
        # a thread that the interpreter finds in a model at its end makes it abort, and one in a picture makes it wait
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _log_models(application: Application) -> None:
    """Say what is served; a function of its own, so that no frame keeps a model that is replaced."""
    for served in application.service.everything():
        logger.info("serving %s", described(served.model))


class Server(uvicorn.Server):
    """Uvicorn, which on the first signal first tells the world that we are not ready any more."""

    def __init__(self, application: Application) -> None:
        settings = application.settings
        config = uvicorn.Config(
            application,
            loop="uvloop" if sys.platform != "win32" else "asyncio",
            http=connections_of(application, settings),
            lifespan="on",
            log_config=None,  # `serving.operations.log` has configured its loggers as well
            access_log=False,
            server_header=False,
            proxy_headers=False,  # nothing here depends on who asks, so nobody's word needs to be believed
            timeout_keep_alive=int(settings.keep_alive_timeout) or 1,
            timeout_graceful_shutdown=int(settings.drain_timeout) or 1,
            limit_concurrency=settings.max_connections,
            ws="none",
        )
        config.load()
        config.ssl = ssl_context(settings)
        super().__init__(config)
        if config.ssl is not None:
            most = settings.max_connections + SPARE_CONNECTIONS
            limit_handshakes(config.ssl, self.server_state.connections, most, settings.header_timeout)
        self._application = application
        self._exit_at: float | None = None
        self._hung_up = False
        self._loop: asyncio.AbstractEventLoop | None = None
        """Set while it shuts down."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain on the first signal, and stop at once on the second.

        Unlike uvicorn's own, it does not raise the signal again afterwards: SIGTERM and Ctrl-C are the ways to stop a
        server, so both end in a normal return.
        """
        if self._exit_at is None:
            self._application.service.begin_drain()
            self._exit_at = time.monotonic() + self._application.settings.drain_delay
        else:
            self.should_exit = self.force_exit = True
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self._application.service.hurry)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen; a handshake may take as long as a head does, for which uvicorn has no setting."""
        loop, seconds = asyncio.get_running_loop(), self._application.settings.header_timeout
        if self.config.ssl is not None:
            loop.create_server = functools.partial(  # type: ignore[method-assign]
                loop.create_server, ssl_handshake_timeout=seconds, ssl_shutdown_timeout=seconds
            )
        await super().startup(sockets)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Give the requests in flight, of every protocol, the same time to drain; none after a second signal."""
        service = self._application.service
        self._loop = asyncio.get_running_loop()
        service.close_by(time.monotonic() + self._application.settings.drain_timeout)
        if self.force_exit:
            service.hurry()
        await super().shutdown(sockets)
        if self.force_exit:  # uvicorn then leaves the application as it is, with its threads and sockets
            service.hurry()
            await self.lifespan.shutdown()

    def handle_hang_up(self, sig: int, frame: FrameType | None) -> None:
        """Read keys and certificate again, soon, on SIGHUP."""
        self._hung_up = True

    async def on_tick(self, counter: int) -> bool:
        """Tell uvicorn, which asks every tenth of a second, whether to stop."""
        if self._hung_up:
            self._hung_up = False
            self._renew()
        if self._exit_at is not None and time.monotonic() >= self._exit_at:
            self.should_exit = True
        return await super().on_tick(counter)

    def _renew(self) -> None:
        self._application.admission.reload()
        try:
            if self.config.ssl is not None:
                renew(self.config.ssl, self._application.settings)
        except BadInput as error:
            logger.error("the certificate stays as it was: %s", error)


def _mount_demo(application: Application, models: Sequence[str]) -> None:
    try:
        from serving.demo.page import mount  # not above: it is an extra, and loads torch
    except ModuleNotFoundError as error:
        raise BadInput(f"the demo needs {error.name!r}; install it with `pip install 'manygates[demo]'`") from error
    most = application.settings.max_image_pixels
    application.rest = mount(application.starlette, "/demo", list(models), max_pixels=most)
