"""What a message to a client shows of the client's own request."""

import itertools
import reprlib
from typing import Any, Final

_MAX_SHOWN: Final = 160


def shown(value: Any) -> str:
    """Show a value from a request, however large it is."""
    text = _SHORTENED.repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."


class _Shortened(reprlib.Repr):
    """The standard library's short forms, without its sorting of a whole object to show four of its keys."""

    def repr_dict(self, x: dict[Any, Any], level: int) -> str:
        if level <= 0:
            return "{...}"
        first = itertools.islice(x.items(), self.maxdict)
        shown = [f"{self.repr1(key, level - 1)}: {self.repr1(value, level - 1)}" for key, value in first]
        return "{" + ", ".join(shown + ["..."] * (len(x) > self.maxdict)) + "}"


_SHORTENED: Final = _Shortened()
_SHORTENED.maxlevel = 2
