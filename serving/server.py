"""The server process: sockets, signals, start and stop around the application."""

import importlib
import ipaddress
import logging
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

import uvicorn

from serving.app import Application, Model
from serving.connection import SPARE_CONNECTIONS, with_header_timeout
from serving.engine import Engine, choose_mode, graph_files
from serving.exits import LAST_EXIT, ExitChoice
from serving.settings import Settings
from zoo.catalogue import open_model
from zoo.errors import BadInput

logger = logging.getLogger("manygates.serving")

_OTHER_FILES = 128  # what is open besides connections: libraries, the log, the event loop, a model being loaded


def serve(
    models: Sequence[str],
    *,
    mode: str | None = None,
    exit: int | None = None,
    confidence: float | Sequence[float] | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    demo: bool = False,
    settings: Settings | None = None,
) -> None:
    """Serve models until SIGTERM or Ctrl-C; returns when the last request is answered.

    Args:
        models: catalogue names, `local-dir:FOLDER` or `hf-hub:ORGANISATION/NAME`; the first is the default.
        mode: `single`, `ensemble` or `random`, for all of them; None takes `single`.
        exit: which exit of multi-exit models answers, from 1; None is the last.
        confidence: rather than that, the first exit answers whose largest probability is at least this, in (0, 1]: one
            number, or one per exit but the last.
        host: the address to listen on.
        port: 0 takes a free one; the line on standard error names it.
        demo: also serve the demo under /demo (needs the extra `manygates[demo]`).
        settings: None takes the defaults and what the environment sets.

    Raises:
        BadInput: if the address cannot be used, a model lacks the mode or the exit, or a setting makes no sense.
        UnknownName: for a model or mode that does not exist.
        BundleError: if a bundle is damaged.
    """
    exit_choice = ExitChoice(exit=exit, confidence=confidence)
    with _stopped_by_signals():
        _serve(models, mode, exit_choice, host, port, demo, settings or Settings.from_environment())


class _Stopped(BaseException):
    """A signal to stop came before there was anything to drain."""


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """End the block on SIGTERM or Ctrl-C, as long as nothing in it has handlers of its own.

    Without this SIGTERM would leave a traceback while a model is loaded, and do nothing at all in a container's first
    process.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise _Stopped

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    except _Stopped:
        print("manygates was stopped before it served anything", file=sys.stderr, flush=True)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _serve(
    models: Sequence[str],
    mode: str | None,
    exit_choice: ExitChoice,
    host: str,
    port: int,
    demo: bool,
    settings: Settings,
) -> None:
    allow_open_files(settings.max_connections + SPARE_CONNECTIONS + _OTHER_FILES)
    # what Pillow thinks of files that clients send is answered to them; the log would fill with it
    warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
    listener = bind(host, port)  # before loading: a port in use should not cost the time to load
    try:
        application = Application([load(model, mode, settings, exit_choice) for model in models], settings)
        if demo:
            _mount_demo(application, models)
        server = Server(application)
    except BaseException:
        listener.close()
        raise
    names = ", ".join(models)
    print(f"manygates serves {names} at {url_of(listener)} (Ctrl-C stops)", file=sys.stderr, flush=True)
    server.run(sockets=[listener])


def load(model: str, mode: str | None, settings: Settings, exit_choice: ExitChoice = LAST_EXIT) -> Model:
    """Find a model, load the graphs of its mode and exits, and run them once at every batch size.

    Raises:
        ManygatesError: of many kinds; see `serve`.
    """
    card = open_model(model, only=()).card
    chosen = choose_mode(card, mode)
    any_exit = settings.allow_exit_choice
    engine = Engine(
        open_model(model, only=graph_files(card, chosen, exit_choice, any_exit=any_exit)),
        chosen,
        threads=settings.workers,
        intra_op=settings.intra_op,
        device=settings.device,
        allow_cpu_fallback=settings.allow_cpu_fallback,
        allow_spinning=settings.allow_spinning,
        exit_choice=exit_choice,
        any_exit=any_exit,
    )
    engine.warm_up(settings.max_batch)
    limits = engine.limits if any_exit else None
    return Model(card=engine.card, mode=engine.mode, predictor=engine, limits=limits)


def allow_open_files(number: int) -> None:
    """Raise this process's limit of open files to `number` if it is lower and may be raised; warn if it may not."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= number:
        return
    wanted = number if hard == resource.RLIM_INFINITY else min(number, hard)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    except (OSError, ValueError):  # some systems have further limits of their own
        wanted = soft
    if wanted < number:
        logger.warning(
            "this process may open %d files, and max_connections needs %d: connections beyond that will wait; raise "
            "the limit (ulimit -n) or lower MANYGATES_SERVE_MAX_CONNECTIONS",
            wanted,
            number,
        )


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that listens on the address: whoever connects waits until the server has loaded its models.

    Raises:
        BadInput: if the address cannot be used.
    """
    if not 0 <= port <= 65535:
        raise BadInput(f"port {port} is out of range, expected 0 to 65535; 0 takes a free one")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        # two processes may both bind with SO_REUSEADDR; only listening tells
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise BadInput(
            f"cannot listen on {host} port {port} ({error.strerror or error}); choose another with --host or --port, "
            "or stop what uses it"
        ) from error
    listener.setblocking(False)
    return listener


def url_of(listener: socket.socket) -> str:
    """Return the URL under which a bound socket is reached."""
    host, port = listener.getsockname()[:2]
    address = ipaddress.ip_address(host.partition("%")[0])
    return f"http://[{host}]:{port}" if address.version == 6 else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """Uvicorn, which on the first signal first tells the world that we are not ready any more."""

    def __init__(self, application: Application) -> None:
        """Prepare to serve `application` with its own settings."""
        settings = application.settings
        super().__init__(
            uvicorn.Config(
                application,
                loop="uvloop" if sys.platform != "win32" else "asyncio",
                http=with_header_timeout(settings.header_timeout),
                lifespan="on",
                log_level="warning",
                access_log=False,
                server_header=False,
                proxy_headers=False,  # nothing here depends on who asks, so nobody's word needs to be believed
                timeout_keep_alive=int(settings.keep_alive_timeout) or 1,
                timeout_graceful_shutdown=int(settings.drain_timeout) or 1,
                limit_concurrency=settings.max_connections,
                ws="none",
            )
        )
        self._application = application
        self._exit_at: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain on the first signal, and stop at once on the second.

        Unlike uvicorn's own, it does not raise the signal again afterwards: SIGTERM and Ctrl-C are the ways to stop a
        server, so both end in a normal return.
        """
        if self._exit_at is None:
            self._application.begin_drain()
            self._exit_at = time.monotonic() + self._application.settings.drain_delay
        else:
            self.should_exit = self.force_exit = True

    async def on_tick(self, counter: int) -> bool:
        """Tell uvicorn, which asks every tenth of a second, whether to stop."""
        if self._exit_at is not None and time.monotonic() >= self._exit_at:
            self.should_exit = True
        return await super().on_tick(counter)


def _mount_demo(application: Application, models: Sequence[str]) -> None:
    try:
        demo = importlib.import_module("serving.demo")  # not above: it is an extra, and may load torch
    except ModuleNotFoundError as error:
        raise BadInput(f"the demo needs {error.name!r}; install it with `pip install 'manygates[demo]'`") from error
    application.rest = demo.mount(application.starlette, "/demo", list(models))
