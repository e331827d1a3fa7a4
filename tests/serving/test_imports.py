import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

IMPORT_ALL = """
import importlib, pkgutil, sys
import serving
names = [f"serving.{module.name}" for module in pkgutil.iter_modules(serving.__path__) if module.name != "demo"]
names += [f"zoo.{name}" for name in "errors files paths card bundle model_card catalogue pictures".split()]
assert len(names) >= 14, names
for name in names:
    importlib.import_module(name)
loaded = [name for name in ("torch", "torchvision", "training", "gradio", "onnx", "pyarrow") if name in sys.modules]
print(loaded)
"""


def test_the_server_and_the_zoos_ground_floor_load_no_torch() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORT_ALL], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
