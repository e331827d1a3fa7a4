"""ONNX Runtime on graphs of our own making: sessions on the CPU, and errors in our words."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import onnxruntime

from zoo.errors import BundleError

_runtime: Any = onnxruntime  # it re-exports its names without saying so, which strict typing refuses

VERSION: str = _runtime.__version__


class GraphError(BundleError):
    """A graph that ONNX Runtime cannot load or run."""


def session(content: bytes, *, threads: int | None = None) -> Any:
    """Open a graph on the CPU, quietly; on all cores if `threads` is None.

    Raises:
        BundleError: ONNX Runtime cannot load it.
    """
    options = _runtime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    # A graph may name files to read its weights from; in this "folder" there can be none, inside it or above it.
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", os.devnull)
    try:
        return _runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions have no common base of their own
        raise GraphError(f"ONNX Runtime cannot load the graph ({error}); export it again") from error


def run(opened: Any, feeds: dict[str, np.ndarray], *names: str) -> tuple[np.ndarray, ...]:
    """Return the named outputs.

    Raises:
        BundleError: the graph fails on them.
    """
    try:
        answers: list[np.ndarray] = opened.run(list(names), feeds)
    except Exception as error:  # as above
        raise GraphError(f"ONNX Runtime cannot run the graph ({error}); export it again") from error
    return tuple(answers)
