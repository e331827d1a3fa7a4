"""What an evaluation has measured so far, on disk. An interrupted one goes on where it stopped, with the same numbers.

The ledger is a file of JSON lines, which `zoo.evaluation.registry.ledger_of` names. Each line holds one batch of one
stage. It is removed when the evaluation is done, so asking again measures again.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from zoo.files import writing


def digest_of(terms: Mapping[str, Any]) -> str:
    """Return the SHA-256 of terms that can be written as JSON, the same for the same terms."""
    return hashlib.sha256(json.dumps(terms, sort_keys=True).encode()).hexdigest()


class Ledger:
    """Stages and batches that are done; a context that removes its file when the work ends without an exception.

    Args:
        file: where they are kept; in memory alone if None.
    """

    def __init__(self, file: Path | None = None) -> None:
        self.file = file
        self._known: dict[str, Tensor] = {}
        if file is not None and file.is_file():
            for line in file.read_text(encoding="utf-8").splitlines():
                try:
                    entry = json.loads(line)
                    content = np.frombuffer(base64.b64decode(entry["values"]), dtype=entry["type"])
                    self._known[entry["key"]] = torch.from_numpy(content.reshape(entry["shape"]).copy())
                except (ValueError, KeyError, TypeError):  # the line at which it was interrupted
                    continue

    def __len__(self) -> int:
        return len(self._known)

    def get(self, key: str) -> Tensor | None:
        """Return what was measured under `key`, or None."""
        return self._known.get(key)

    def put(self, key: str, values: Tensor) -> None:
        """Keep what was measured, at once."""
        array = np.ascontiguousarray(values.cpu().numpy())
        self._known[key] = torch.from_numpy(array.copy())
        if self.file is None:
            return
        entry = {
            "key": key,
            "type": array.dtype.str,
            "shape": list(array.shape),
            "values": base64.b64encode(array.tobytes()).decode(),
        }
        with writing(self.file):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            whole = self.file.stat().st_size if self.file.is_file() else 0
            try:
                with self.file.open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps(entry) + "\n")
            except OSError:  # a disk that is full may have taken half of the line
                if self.file.is_file():
                    os.truncate(self.file, whole)
                raise

    def clear(self) -> None:
        """Forget everything."""
        self._known.clear()
        if self.file is not None:
            self.file.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.clear()
