# The server with its bundled models, without torch:
#
#     docker build --tag manygates .
#     docker run --rm --publish 8000:8000 --read-only --tmpfs /tmp manygates
#
# Another model by its name: docker run … manygates manygates serve hf-hub:ORGANISATION/NAME --host 0.0.0.0

FROM python:3.11-slim AS builder
WORKDIR /source
COPY pyproject.toml README.md LICENSE manygates.py ./
COPY zoo zoo
COPY training training
COPY serving serving
ENV PIP_CACHE_DIR=/pip-cache
RUN --mount=type=cache,target=/pip-cache \
    pip wheel --no-deps --wheel-dir /wheels . \
    && python -m venv /opt/venv \
    && /opt/venv/bin/pip install "$(echo /wheels/manygates-*.whl)[serve]" \
    && /opt/venv/bin/pip check
# The promise of this image, checked while it is built: torch is not in it, the server and its models are.
RUN ["/opt/venv/bin/python", "-I", "-c", "import importlib.util as u, serving.server, zoo.catalogue as c; assert not u.find_spec('torch'), 'torch is in the image'; assert c.list_bundled(), 'no bundled model is in the wheel'"]

FROM python:3.11-slim
LABEL org.opencontainers.image.title="manygates" \
      org.opencontainers.image.description="Inference server for adversarially robust image classifiers" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="Apache-2.0"
# Models from the hub are kept in /models; a volume there keeps them from one container to the next.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HF_HOME=/models
RUN groupadd --gid 10001 manygates \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /models --shell /usr/sbin/nologin manygates \
    && install --directory --owner 10001 --group 10001 /models
COPY --from=builder /opt/venv /opt/venv
USER 10001:10001
WORKDIR /models
VOLUME /models
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=30s --retries=3 \
    CMD ["python", "-I", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/v2/health/ready', timeout=2)"]
CMD ["manygates", "serve", "--host", "0.0.0.0"]
