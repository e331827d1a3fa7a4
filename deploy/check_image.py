"""Build the Dockerfile without a container engine, and try what docs/deploy.md promises of the image.

    python deploy/check_image.py [--variant cuda] [--base IMAGE] [--source FOLDER] [--keep]

It needs root, Debian's buildah, and a network for the packages that are installed. `--base` is the image to build on;
without one (no registry can be reached) a stand-in is made with debootstrap: Debian 12 with its Python 3.11, as in
python:3.11-slim-bookworm, which differs from it in where that Python lies. Every instruction of the real Dockerfile is
executed, `RUN` in a chroot. Then its health check and its command run as its user, with no capability, no new
privileges, a read-only root, an empty /tmp and a network of their own, and are asked over HTTP.

The last line is JSON: sizes, times, and what held. Exit code 1 if anything did not.
"""

import argparse
import configparser
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

ROOT = Path(__file__).resolve().parents[1]
TAG = "localhost/manygates-check"
STAND_IN = "localhost/python-stand-in:3.11-slim-bookworm"
STAND_IN_PACKAGES = "ca-certificates,netbase,python-is-python3,python3,python3-pip,python3-venv,tzdata"
START_SECONDS, STOP_SECONDS = 60, 45

# Runs as the first process of a new mount, process and network namespace: $1 is the root, $2 where hub models are kept.
ENTER = """
set -eu
root=$1; models=$2; shift 2
mount --make-rprivate /
mount --bind "$root" "$root"
mount -t proc proc "$root/proc"
mount -t tmpfs -o mode=755 tmpfs "$root/dev"
mkdir "$root/dev/shm"
mount -t tmpfs -o mode=1777 tmpfs "$root/dev/shm"
for device in null zero full random urandom; do
    : >"$root/dev/$device"; mount --bind "/dev/$device" "$root/dev/$device"
done
mount -t tmpfs -o mode=1777,nosuid,nodev tmpfs "$root/tmp"
mount --bind "$models" "$root/models"
mount -o remount,bind,ro "$root"
ip link set lo up
exec chroot "$root" "$@"
"""

# Runs in the container's network, with this machine's Python: one picture through `/classify`, and what else is said.
ASK = """
import io, json, sys, urllib.request
from PIL import Image
base = "http://127.0.0.1:8000"
def get(path, **options):
    with urllib.request.urlopen(urllib.request.Request(base + path, **options), timeout=20) as answer:
        return answer.read()
picture = io.BytesIO()
Image.linear_gradient("L").resize((48, 40)).convert("RGB").save(picture, "PNG")
headers = {"Content-Type": "image/png"}
print(json.dumps({
    "server": json.loads(get("/v2")),
    "answer": json.loads(get("/classify?top=2", data=picture.getvalue(), headers=headers)),
    "metrics": "manygates_images_total" in get("/metrics").decode(),
}))
"""

# Runs in the container, with its own Python: gRPC's standard health service.
ASK_GRPC = """
import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
channel = grpc.insecure_channel("127.0.0.1:8001")
answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
assert answer.status == health_pb2.HealthCheckResponse.SERVING, answer
"""


def main() -> int:
    """Build, run, ask; returns the exit code."""
    arguments = parser().parse_args()
    if os.geteuid() != 0:
        sys.exit("check_image: this needs root, for chroot and mounts; run it with sudo or in a container")
    for program, package in (("buildah", "buildah"), ("unshare", "util-linux"), ("ip", "iproute2")):
        if shutil.which(program) is None:
            sys.exit(f"check_image: {program} is not installed; on Debian: apt-get install {package}")
    tag = f"{TAG}:{arguments.variant}"
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="check-image-")))
        base = arguments.base or stand_in(work)
        before = time.monotonic()
        build(arguments.source, tag, base, arguments.variant, work)
        report: dict[str, Any] = {"base": base, "variant": arguments.variant}
        report["build_seconds"] = round(time.monotonic() - before, 1)
        if not arguments.keep:
            stack.callback(run, "buildah", "rmi", tag)
        image = json.loads(run("buildah", "inspect", "--type", "image", tag))
        report["image_size"] = json.loads(run("buildah", "images", "--json", tag))[0]["size"]
        root = stack.enter_context(mounted(tag))
        checks = inspect(image["Docker"]["config"], root, arguments.variant, report)
        checks |= exercise(image["Docker"]["config"], root, work, arguments.variant, report)
    report["checks"] = checks
    for name, held in checks.items():
        print(f"{'ok  ' if held else 'FAIL'} {name}", file=sys.stderr)
    print(json.dumps(report))
    return 0 if all(checks.values()) else 1


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    commands = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands.add_argument("--variant", choices=("cpu", "cuda"), default="cpu")
    commands.add_argument("--source", type=Path, default=ROOT, help="the folder to build; default: this one's parent")
    commands.add_argument("--base", help="the image to build on; default: a stand-in made with debootstrap")
    commands.add_argument("--keep", action="store_true", help=f"keep the image, as {TAG}:VARIANT")
    return commands


def run(*command: str, **options: Any) -> str:
    """Run a program and return what it prints; what it says goes to standard error."""
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, **options)
    if done.returncode:
        sys.exit(f"check_image: {shlex.join(command[:6])} … failed with {done.returncode}")
    return done.stdout


def stand_in(work: Path) -> str:
    """Return an image with Debian 12 and its Python 3.11; the one of an earlier call if it is still there."""
    if subprocess.run(["buildah", "inspect", "--type", "image", STAND_IN], capture_output=True, check=False).returncode:
        if shutil.which("debootstrap") is None:
            sys.exit("check_image: debootstrap is not installed; apt-get install debootstrap, or name --base")
        folder = work / "root"
        run("debootstrap", "--variant=minbase", f"--include={STAND_IN_PACKAGES}", "bookworm", str(folder))
        container = run("buildah", "from", "scratch").strip()
        mount = run("buildah", "mount", container).strip()
        run("cp", "--archive", f"{folder}/.", mount)
        run("buildah", "umount", container)
        run("buildah", "commit", "--quiet", "--format", "docker", "--rm", container, STAND_IN)
    return STAND_IN


def build(source: Path, tag: str, base: str, variant: str, work: Path) -> None:
    """Execute the Dockerfile; pip inside it is configured as it is on this machine."""
    volumes = [item for source, target in pip_configuration(work) for item in ("--volume", f"{source}:{target}:ro")]
    command = ["buildah", "bud", "--isolation", "chroot", "--format", "docker", "--tag", tag, *volumes]
    command += ["--build-arg", f"PYTHON_IMAGE={base}", "--build-arg", f"VARIANT={variant}", str(source)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        print(*done.stdout.splitlines()[-40:], sep="\n", file=sys.stderr)
        sys.exit(f"check_image: the build failed with {done.returncode}; above is how it ended")


def pip_configuration(work: Path) -> Iterator[tuple[Path, str]]:
    """Yield what has to be mounted, and where, so that pip in the image finds packages as pip on this machine does."""
    values = {}
    for line in run(sys.executable, "-m", "pip", "config", "list").splitlines():
        name, _, value = line.partition("=")
        values[name.rpartition(".")[2]] = value.strip("'\"")
    configuration = configparser.RawConfigParser()
    configuration["global"] = values
    file = work / "pip.conf"
    with file.open("w", encoding="utf-8") as stream:
        configuration.write(stream)
    yield file, "/etc/pip.conf"
    words = " ".join(values.get(name, "") for name in ("extra-index-url", "find-links", "index-url", "cert")).split()
    local = {url2pathname(urlsplit(word).path) for word in words if word.startswith(("file:", "/"))}
    for folder in sorted(local):
        # an index of files links to files beside it
        place = Path(folder).parent if Path(folder).name == "simple" else Path(folder)
        if place.exists():
            yield place, str(place)


@contextmanager
def mounted(tag: str) -> Iterator[Path]:
    """Mount the image's file system; it is gone afterwards."""
    container = run("buildah", "from", "--pull-never", tag).strip()
    try:
        yield Path(run("buildah", "mount", container).strip())
    finally:
        run("buildah", "umount", container)
        run("buildah", "rm", container)


def inspect(configuration: dict[str, Any], root: Path, variant: str, report: dict[str, Any]) -> dict[str, bool]:
    """Look at the image at rest."""
    packages = next((root / "opt/venv/lib").glob("python*/site-packages"))
    report["site_packages_bytes"] = size_of(packages)
    report["environment_bytes"] = size_of(root / "opt/venv")
    report["packages"] = len(list(packages.glob("*.dist-info")))
    sbom = json.loads((root / "usr/share/doc/manygates/sbom.cdx.json").read_text(encoding="utf-8"))
    listed = {(canonical(component["name"]), component["version"]) for component in sbom["components"]}
    listed.add(("manygates", sbom["metadata"]["component"]["version"]))
    found = importlib.metadata.distributions(path=[str(packages)])
    installed = {(canonical(distribution.name), distribution.version) for distribution in found}
    foreign = [
        file
        for place in ("opt/venv", "models")
        for file in (root / place).rglob("*")
        if not file.is_symlink() and file.stat().st_mode & 0o6002
    ]
    libraries = {}
    if variant == "cuda":  # the driver's library comes with the machine
        provider = f"/{(packages / 'onnxruntime/capi/libonnxruntime_providers_cuda.so').relative_to(root)}"
        linked = run("chroot", str(root), "env", *configuration["Env"], "ldd", provider).splitlines()
        missing = {line.split()[0] for line in linked if "not found" in line}
        libraries = {"the CUDA provider finds its libraries": missing <= {"libcuda.so.1"}}
    return libraries | {
        "the user is not root": configuration["User"] == "10001:10001",
        "both ports are exposed": set(configuration["ExposedPorts"]) == {"8000/tcp", "8001/tcp"},
        "it stops at SIGTERM": configuration["StopSignal"] == "SIGTERM",
        "it is labelled": configuration["Labels"]["org.opencontainers.image.title"] == "manygates",
        "no torch, no training": not any((packages / name).exists() for name in ("torch", "torchvision", "gradio")),
        "one ONNX Runtime": len(list(packages.glob("onnxruntime*.dist-info"))) == 1,
        "no pip in the environment": not (packages / "pip").exists(),
        "the SBOM is CycloneDX": sbom["bomFormat"] == "CycloneDX",
        "the SBOM lists what is installed, and nothing else": listed == installed,
        "nothing is set-user-id or writable by all": not foreign,
    }


def canonical(name: str) -> str:
    """Return a package's name as indexes spell it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def size_of(folder: Path) -> int:
    """Return the bytes of a folder's files, in whole blocks, as `du` counts them."""
    return int(run("du", "--summarize", "--block-size=1", str(folder)).split()[0])


def exercise(
    configuration: dict[str, Any], root: Path, work: Path, variant: str, report: dict[str, Any]
) -> dict[str, bool]:
    """Run the image's command, ask it, check its health, and stop it."""
    models = work / "models"
    models.mkdir()
    user, _, group = configuration["User"].partition(":")
    os.chown(models, int(user), int(group))
    environment = list(configuration["Env"])
    if variant == "cuda":  # there may be no GPU here; that its absence is an error is tried first
        environment.append("MANYGATES_SERVE_ALLOW_CPU_FALLBACK=true")
    drop = f"setpriv --reuid={user} --regid={group} --clear-groups --bounding-set=-all --inh-caps=-all --no-new-privs"
    inside = ["/usr/bin/env", "--ignore-environment", f"--chdir={configuration['WorkingDir']}", *environment]
    confined = [*shlex.split(drop), *inside]
    log = work / "server.log"
    before = time.monotonic()
    with log.open("wb") as stream:
        outer = subprocess.Popen(
            [
                *("unshare", "--mount", "--pid", "--net", "--ipc", "--uts", "--fork", "--kill-child"),
                *("sh", "-c", ENTER, "enter", str(root), str(models), *confined, *configuration["Cmd"]),
            ],
            stderr=stream,
        )
    try:
        first = first_process(outer)
        enter = ["nsenter", f"--target={first}", "--mount", "--pid", "--net", "--root", "--wd=/"]
        health = [*enter, *confined, *configuration["Healthcheck"]["Test"][1:]]
        assert configuration["Healthcheck"]["Test"][0] == "CMD"
        healthy = False
        while not healthy and outer.poll() is None and time.monotonic() - before < START_SECONDS:
            healthy = subprocess.run(health, stderr=subprocess.DEVNULL, check=False).returncode == 0
        report["start_seconds"] = round(time.monotonic() - before, 2)
        if not healthy:
            print(log.read_text(encoding="utf-8", errors="replace"), file=sys.stderr)
            return {"the health check passes": False}
        said = json.loads(run("nsenter", f"--target={first}", "--net", sys.executable, "-c", ASK))
        status = Path(f"/proc/{first}/status").read_text(encoding="utf-8")
        report["answer"], report["server"] = said["answer"], said["server"]
        report["resident_kb"] = int(status.partition("VmRSS:")[2].split()[0])
        writes = {
            place: subprocess.run(
                [*enter, *confined, "sh", "-c", f"echo x >{place}/probe"], stderr=subprocess.DEVNULL, check=False
            ).returncode
            == 0
            for place in ("/opt/venv", "/tmp", "/models", "/usr/local")
        }
        grpc = subprocess.run([*enter, *confined, "python", "-I", "-c", ASK_GRPC], check=False).returncode
        imports = [*enter, *confined, "python", "-I", "-c", "import torch"]
        torch = subprocess.run(imports, stderr=subprocess.DEVNULL, check=False).returncode
        os.kill(first, 15)
        code = outer.wait(STOP_SECONDS)
        return {
            "the health check passes": True,
            "a picture is classified": sum(said["answer"]["probabilities"].values()) > 0,
            "there are metrics": said["metrics"],
            "gRPC says that it is serving": grpc == 0,
            "the server is the first process, and not root": f"\nUid:\t{user}\t{user}\t{user}\t{user}\n" in status
            and "NSpid:" in status
            and status.partition("NSpid:")[2].splitlines()[0].split()[-1] == "1",
            "it has no capability": "CapEff:\t0000000000000000" in status and "CapBnd:\t0000000000000000" in status,
            "it can gain no privileges": "NoNewPrivs:\t1" in status,
            "the root is read-only, /tmp and /models are not": writes
            == {"/opt/venv": False, "/tmp": True, "/models": True, "/usr/local": False},
            "torch cannot be imported": torch == 1,
            "SIGTERM ends it with 0": code == 0,
        }
    finally:
        if outer.poll() is None:
            outer.kill()
            outer.wait()


def first_process(outer: subprocess.Popen[bytes]) -> int:
    """Return the number, here, of the process that is the first one inside."""
    children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children")
    while outer.poll() is None:
        if numbers := children.read_text(encoding="ascii").split():
            return int(numbers[0])
        time.sleep(0.01)
    sys.exit(f"check_image: the container ended with {outer.returncode} before it began")


if __name__ == "__main__":
    sys.exit(main())
