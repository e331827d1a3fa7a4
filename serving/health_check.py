"""Ask the server on this machine whether it is ready: what a container's health check runs.

    python -m serving.health_check

It exits with 0 if the server says that it is ready, else with 1 and the reason on standard error. Where to ask follows
from the environment, as for the server itself: `MANYGATES_SERVE_PORT`, and https if there is a
`MANYGATES_SERVE_TLS_CERTIFICATE`. Where clients need certificates (`MANYGATES_SERVE_TLS_CLIENT_CA`) it has none, and is
content if the server takes connections. It imports the standard library alone, because it runs every few seconds.
"""

import os
import socket
import ssl
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping

_PREFIX = "MANYGATES_SERVE_"
_TIMEOUT = 2.0


def address(environment: Mapping[str, str] = os.environ) -> str:
    """Return the URL to ask: always of this machine, whatever addresses the server listens on."""
    port = environment.get(f"{_PREFIX}PORT", "")
    # Kubernetes sets this very name, to tcp://…, where a Service is called manygates-serve
    place = f"127.0.0.1:{port if port.isdecimal() else 8000}"
    if environment.get(f"{_PREFIX}TLS_CLIENT_CA"):
        return f"tcp://{place}"
    return f"{'https' if environment.get(f'{_PREFIX}TLS_CERTIFICATE') else 'http'}://{place}/v2/health/ready"


def reason_against(url: str, timeout: float = _TIMEOUT) -> str | None:
    """Return why the server at `url` is not ready, or None if it is; of tcp://HOST:PORT, whether it can be reached."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme == "tcp":
        try:
            socket.create_connection((parts.hostname, parts.port), timeout).close()
        except OSError as error:
            return f"{url}: {error}"
        return None
    context = None
    if parts.scheme == "https":
        # the certificate is for the name that clients know; here only the answer counts, and it comes from this machine
        context = ssl.create_default_context()
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    # no proxy, whatever the environment says: the server is here
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context))
    try:
        with opener.open(url, timeout=timeout):
            return None
    except urllib.error.HTTPError as error:
        return f"{url} answers {error.code}"
    except OSError as error:
        return f"{url}: {error}"


def main() -> int:
    """Run the check; returns the exit code."""
    reason = reason_against(address())
    if reason is not None:
        print(reason, file=sys.stderr)
    return reason is not None


if __name__ == "__main__":
    sys.exit(main())
