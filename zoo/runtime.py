"""ONNX Runtime, imported here and nowhere else: some builds report to their makers unless they are told not to.

They look at the environment when they are imported, keep an identifier below the home folder, and complain where there
is none (1.31 does). Whoever wants the reports sets ORT_DISABLE_TELEMETRY=0.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np

from zoo.errors import BundleError

# before the import
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnxruntime

runtime: Any = onnxruntime  # it re-exports its names without saying so, which strict typing refuses
if os.environ["ORT_DISABLE_TELEMETRY"] != "0":
    runtime.disable_telemetry_events()  # of builds that know no such variable


CPU: Final = "CPUExecutionProvider"


def quantization() -> Any:
    """Return ONNX Runtime's quantiser: a package of its own, and a large one, which only an export needs."""
    import onnxruntime.quantization

    return onnxruntime.quantization


class GraphError(BundleError):
    """A graph that ONNX Runtime cannot load or run."""


def session(
    content: bytes,
    *,
    threads: int | None = None,
    providers: Sequence[str] = (CPU,),
    configure: Callable[[Any], None] | None = None,
) -> Any:
    """Open a graph, quietly.

    Args:
        content: the graph; it may not keep its weights in other files.
        threads: how many cores one call uses; None is all.
        providers: what computes, in the order of preference.
        configure: changes the session's options before it is opened.

    Raises:
        GraphError: ONNX Runtime cannot load it.
    """
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    # A graph may name files to read its weights from; in this "folder" there can be none, inside it or above it.
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", os.devnull)
    if configure is not None:
        configure(options)
    try:
        return runtime.InferenceSession(content, options, providers=list(providers))
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
