"""Where things are kept that can be made or fetched again."""

import os
from pathlib import Path

from zoo.errors import BadInput

CACHE_VARIABLE = "MANYGATES_CACHE"


def cache_dir() -> Path:
    """Return the folder for what can be made again: `MANYGATES_CACHE`, else `manygates` in the user's cache.

    Raises:
        BadInput: if neither is known: the user has no home folder.
    """
    named = os.environ.get(CACHE_VARIABLE)
    if named:
        return Path(named)
    if cache := os.environ.get("XDG_CACHE_HOME"):
        return Path(cache) / "manygates"
    try:
        return Path.home() / ".cache" / "manygates"
    except RuntimeError as error:
        raise BadInput(f"this user has no home folder to keep anything in; set {CACHE_VARIABLE} to a folder") from error
