"""A bound on connections that have not begun, or not finished, their TLS handshake."""

import ssl
import time
import weakref
from collections.abc import Collection


def limit_handshakes(context: ssl.SSLContext, connections: Collection[object], most: int, timeout: float) -> None:
    """Close a connection before its TLS handshake if there are `most` in theirs and among `connections` already.

    A `Connection` is told of its transport after the handshake only, so it cannot count those that never begin one.
    `timeout` is how many seconds the event loop gives a handshake.
    """
    begun: weakref.WeakKeyDictionary[ssl.SSLObject, float] = weakref.WeakKeyDictionary()

    def full() -> bool:
        return len(begun) + len(connections) >= most

    class Counted(ssl.SSLObject):
        """One connection's TLS."""

        def __new__(cls) -> "Counted":
            now = time.monotonic()
            if full():  # asyncio leaves what was broken off to the garbage collector, which may come late
                for gone in [one for one, since in begun.items() if now - since > timeout]:
                    del begun[gone]
            if full():
                raise ConnectionAbortedError("too many connections")
            new = super().__new__(cls)
            begun[new] = now
            return new

        def do_handshake(self) -> None:
            try:
                super().do_handshake()
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                raise
            except BaseException:
                begun.pop(self, None)
                raise
            begun.pop(self, None)

    context.sslobject_class = Counted
