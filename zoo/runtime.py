"""ONNX Runtime, imported here and nowhere else: some builds report to their makers unless they are told not to.

They look at the environment when they are imported, keep an identifier below the home folder, and complain where there
is none (1.31 does). Whoever wants the reports sets ORT_DISABLE_TELEMETRY=0.
"""

import os
from typing import Any

# before the import
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnxruntime

runtime: Any = onnxruntime  # it re-exports its names without saying so, which strict typing refuses
if os.environ["ORT_DISABLE_TELEMETRY"] != "0":
    runtime.disable_telemetry_events()  # of builds that know no such variable
