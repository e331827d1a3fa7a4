#!/bin/sh
# Install the servers that benchmarks/serving.py compares with, each into a virtual environment of its own under .peers/
# (about 0.9 GB). None of them touches the project's environment.
#
#     sh benchmarks/peers/setup.sh [PYTHON]        (3.11: Triton's wheel brings a stub for each version of Python)
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
python=${1:-python3.11}

install() {
    folder="$root/.peers/$1"
    shift
    "$python" -m venv "$folder"
    "$folder/bin/pip" install --quiet --disable-pip-version-check onnxruntime==1.31.1 "$@"
    echo "$folder"
}

install mosec mosec==0.9.8 numpy==2.4.6
install fastapi fastapi==0.165.0 numpy==2.4.6 'uvicorn[standard]==0.54.0'
install triton nvidia-pytriton==0.7.0 numpy==1.26.4  # it needs numpy 1

# Triton's python backend looks for the stub of this version of Python beside its library.
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
bundled="$root/.peers/triton/lib/python$version/site-packages/pytriton/tritonserver"
cp "$bundled/python_backend_stubs/$version/triton_python_backend_stub" "$bundled/backends/python/"
chmod +x "$bundled/backends/python/triton_python_backend_stub" "$bundled/bin/tritonserver"
