"""What the OpenAPI document says of a handler, written beside the handler."""

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Any, TypeVar

_Handler = TypeVar("_Handler", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Documented:
    """A decorator that leaves itself on a handler of Starlette's, as its attribute `documentation`.

    The operation's words are the handler's docstring, its name is the route's.
    """

    tag: str
    """inference, models or server."""
    _: KW_ONLY
    answer: str
    """The message of a good answer, a class of `serving.protocol.rest_messages`; Text for plain text."""
    takes: str | None = None
    """The message that the body may hold; None for none."""
    refuses: tuple[int, ...] = ()
    """The statuses of its refusals, beside those that every operation has."""
    says_no: bool = False
    """Whether 503 with the same message is an answer as well."""

    def __call__(self, handler: _Handler) -> _Handler:
        """Return `handler`, documented."""
        handler.documentation = self  # type: ignore[attr-defined]
        return handler
