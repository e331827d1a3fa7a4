"""What the OpenAPI document says of a handler, written beside the handler."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

_Handler = TypeVar("_Handler", bound=Callable[..., Any])


@dataclass(frozen=True, kw_only=True, slots=True)
class Documentation:
    """An operation; its words are the handler's docstring, its name is the route's."""

    tag: str
    """inference, models or server."""
    answer: str
    """The message of a good answer, a class of `serving.protocol.rest_messages`; Text for plain text."""
    takes: str | None
    """The message that the body may hold; None for none."""
    refuses: tuple[int, ...]
    """The statuses of its refusals, beside those that every operation has."""
    says_no: bool
    """Whether 503 with the same message is an answer as well."""


def documented(
    tag: str, *, answer: str, takes: str | None = None, refuses: tuple[int, ...] = (), says_no: bool = False
) -> Callable[[_Handler], _Handler]:
    """Return a decorator that leaves a `Documentation` on a handler of Starlette's, as its attribute of that name."""

    def leave(handler: _Handler) -> _Handler:
        handler.documentation = Documentation(  # type: ignore[attr-defined]
            tag=tag, answer=answer, takes=takes, refuses=refuses, says_no=says_no
        )
        return handler

    return leave
