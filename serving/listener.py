"""Listening sockets, and how many files a process may have open for the connections that come in."""

import logging
import socket

from zoo.errors import BadInput

logger = logging.getLogger("manygates.serving")


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


def bind(host: str, port: int, flag: str = "--port") -> socket.socket:
    """Return a socket that listens on the address: whoever connects waits until the server has loaded its models.

    BadInput if the address cannot be used; `flag` is what that tells to choose another port with.
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
            f"cannot listen on {host} port {port} ({error.strerror or error}); choose another with --host or {flag}, "
            "or stop what uses it"
        ) from error
    listener.setblocking(False)
    return listener


def url_of(listener: socket.socket, scheme: str = "http") -> str:
    """Return the URL under which a bound socket is reached."""
    return f"{scheme}://{address_of(*listener.getsockname()[:2])}"


def address_of(host: str, port: int) -> str:
    """Return HOST:PORT, with an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
