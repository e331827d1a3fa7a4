"""Who may ask for what, and how much of it at once, on every protocol."""

import re
from typing import Final

from serving.errors import Headers, RequestError, busy
from serving.operations.keys import Keys
from serving.operations.settings import Settings

_OPEN: Final = frozenset(("/v2/health/live", "/v2/health/ready"))
_MODEL: Final = re.compile(r"/v2/(?:repository/)?models/([^/]+)(/|$)")
# and whatever else is below: what is offered there, only the router knows
_ADMINISTRATION: Final = "/v2/repository/models/"


def model_named_in(path: str) -> str | None:
    """Return the name of the model that a path is about; None if it is about none."""
    found = _MODEL.match(path)
    return found[1] if found else None


class Admission:
    """Who may ask for what: everybody, or who has a key."""

    def __init__(self, settings: Settings) -> None:
        """Read the files of keys; BadInput if one cannot be read or is malformed."""
        self._keys = Keys.from_file(settings.api_keys_file) if settings.api_keys_file else None
        self._administrators = Keys.from_file(settings.admin_keys_file) if settings.admin_keys_file else None

    @property
    def generation(self) -> tuple[int, int]:
        """Changes whenever other keys hold than before."""
        keys, administrators = self._keys, self._administrators
        return (0 if keys is None else keys.generation, 0 if administrators is None else administrators.generation)

    def reload(self) -> None:
        """Read the files of keys again; what makes no sense leaves the keys as they were."""
        for keys in (self._keys, self._administrators):
            if keys is not None:
                keys.reload()

    def check(self, path: str, headers: Headers, model: str | None = None) -> str | None:
        """Return the name of the key that allows a request; None where none is needed.

        Args:
            path: the request's, or what it would be over HTTP.
            headers: its headers or metadata, whose names are in lower case.
            model: which model is asked for; None reads it from the path.

        Raises:
            RequestError: 401 without a key that holds, 403 if it does not hold for this model.
        """
        administration = path.startswith(_ADMINISTRATION)
        keys = self._administrators if administration and self._administrators is not None else self._keys
        if keys is None or path in _OPEN:
            return None
        brought = dict(headers)
        named = model_named_in(path) if model is None else model
        return keys.check(brought.get(b"authorization"), brought.get(b"x-api-key"), named)


class ByteBudget:
    """Bytes of all bodies that are being received or answered: one account for the whole server."""

    __slots__ = ("held", "limit")

    def __init__(self, limit: int) -> None:
        """Allow `limit` bytes at a time."""
        self.held = 0
        """Bytes that are held now; whoever took them gives them back."""
        self.limit = limit

    def has_room(self, length: int) -> bool:
        """Tell whether as many bytes more may be held."""
        return self.held + length <= self.limit

    def take(self, length: int) -> int:
        """Account for bytes that have come, and return their number; 503 if there is no room for them."""
        if self.held + length > self.limit:
            raise self.exhausted()
        self.held += length
        return length

    def give_back(self, length: int) -> None:
        """Forget bytes that were taken."""
        self.held -= length

    def exhausted(self) -> RequestError:
        """Return what a request is answered with for whose body there is no room."""
        error = busy(503, "too_many_bytes", f"requests of {self.limit} bytes are being answered; try again in a second")
        error.headers.append((b"connection", b"close"))
        return error
