"""Where things are kept that can be made or fetched again."""

import os
from pathlib import Path

CACHE_VARIABLE = "MANYGATES_CACHE"


def cache_dir() -> Path:
    """Return the folder for what can be made again: `MANYGATES_CACHE`, else `manygates` in the user's cache."""
    named = os.environ.get(CACHE_VARIABLE)
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "manygates"
