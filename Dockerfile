# The server with its bundled models, without torch. For a processor, and for NVIDIA GPUs:
#
#     docker build --tag manygates .
#     docker build --tag manygates:cuda --build-arg VARIANT=cuda .
#
#     docker run --rm --publish 127.0.0.1:8000:8000 --read-only --tmpfs /tmp --cap-drop ALL \
#         --security-opt no-new-privileges manygates
#
# Another model by its name: docker run … manygates manygates serve hf-hub:ORGANISATION/NAME --host 0.0.0.0
# More in docs/deploy.md; deploy/check_image.py builds this file and tries what it promises.

# A tag that gets security updates; a digest in its place (python:3.11-slim-bookworm@sha256:…) makes a build repeatable.
ARG PYTHON_IMAGE=docker.io/library/python:3.11-slim-bookworm
ARG VARIANT=cpu

FROM ${PYTHON_IMAGE} AS builder
SHELL ["/bin/sh", "-eu", "-c"]
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY zoo zoo
COPY training training
COPY serving serving
COPY manygates manygates
ENV PIP_ROOT_USER_ACTION=ignore
ARG VARIANT
RUN --mount=type=cache,target=/root/.cache/pip \
    case "${VARIANT}" in cpu) extra=serve-cpu ;; cuda) extra=serve-gpu ;; *) echo "VARIANT is cpu or cuda" >&2; exit 1 ;; esac; \
    pip wheel --no-deps --wheel-dir /wheels .; \
    python -m venv --without-pip /opt/venv; \
    pip --python /opt/venv/bin/python install "$(echo /wheels/manygates-*.whl)[${extra}]"; \
    pip --python /opt/venv/bin/python check; \
    if [ "${VARIANT}" = cuda ]; then \
        ln -s "$(/opt/venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/nvidia" /opt/venv/nvidia; \
    fi
# The promise of this image, checked while it is built: torch is not in it, the server and its models are.
RUN ["/opt/venv/bin/python", "-I", "-c", "import importlib.util as u, serving.server, zoo.hub.source as c; assert not u.find_spec('torch'), 'torch is in the image'; assert c.list_bundled(), 'no bundled model is in the wheel'"]
# What is in it, as CycloneDX (Python packages; those of the base image are known to whoever scans the base image).
RUN --mount=type=cache,target=/root/.cache/pip \
    python -m venv /opt/sbom; \
    /opt/sbom/bin/pip install cyclonedx-bom==7.5.0; \
    /opt/sbom/bin/cyclonedx-py environment --pyproject pyproject.toml --mc-type application \
        --output-reproducible --output-format JSON --output-file /sbom.cdx.json /opt/venv/bin/python

FROM ${PYTHON_IMAGE} AS cpu

FROM ${PYTHON_IMAGE} AS cuda
# What NVIDIA's container toolkit gives to the container: all GPUs, and of the driver what computing needs. The rest of
# CUDA 13 and cuDNN 9 is in the image, as packages from PyPI.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    LD_LIBRARY_PATH=/opt/venv/nvidia/cu13/lib:/opt/venv/nvidia/cudnn/lib \
    MANYGATES_SERVE_DEVICE=cuda

# hadolint ignore=DL3006
FROM ${VARIANT}
ARG REVISION=unknown
LABEL org.opencontainers.image.title="manygates" \
      org.opencontainers.image.description="Inference server for adversarially robust image classifiers" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.licenses="Apache-2.0"
# Models from the hub are kept in /models; a volume there keeps them from one container to the next.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HF_HOME=/models \
    HF_HUB_DISABLE_TELEMETRY=1 \
    MANYGATES_SERVE_GRPC_PORT=8001
RUN groupadd --gid 10001 manygates \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /models --shell /usr/sbin/nologin manygates \
    && install --directory --owner 10001 --group 10001 /models
COPY --from=builder /opt/venv /opt/venv
COPY --from=builder /sbom.cdx.json /usr/share/doc/manygates/sbom.cdx.json
COPY --from=builder /source/LICENSE /usr/share/doc/manygates/LICENSE
USER 10001:10001
WORKDIR /models
VOLUME /models
EXPOSE 8000 8001
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=30s --retries=3 CMD ["python", "-I", "-m", "serving.health_check"]
CMD ["manygates", "serve", "--host", "0.0.0.0"]
