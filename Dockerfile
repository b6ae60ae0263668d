# Two targets: `cpu` (the default) and `cuda`.
#
#   docker build -t oodgate .                       CPU
#   docker build -t oodgate:cuda --target cuda .    CUDA; run it with --gpus all
#
# TORCH_INDEX_URL: one more package index. With an index of CPU-only builds of torch the CPU image is several gigabytes
#   smaller; empty, torch comes from the usual index with its CUDA libraries.
# COMPILE=1: adds a C++ compiler to the CPU image, which torch.compile needs while the service runs.
# BASE: any image with Python 3.11 and its venv module will do, e.g. Debian 12 with python3 and python3-venv.
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS dependencies
ARG TORCH_INDEX_URL=""
WORKDIR /src
RUN python3 -m venv /opt/oodgate/venv
ENV PATH=/opt/oodgate/venv/bin:$PATH
# Only what names the dependencies is copied here, so that an edit of the code does not install torch again.
# A local version such as 2.12.1+cpu goes before 2.12.1 and fits the same pin.
COPY pyproject.toml constraints.txt ./
RUN python3 -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" \
        > requirements.txt \
    && pip install --no-cache-dir ${TORCH_INDEX_URL:+--extra-index-url ${TORCH_INDEX_URL}} \
        -c constraints.txt -r requirements.txt

# Not built on the dependencies: a builder that keeps what others are built on would keep those gigabytes twice.
FROM ${BASE} AS wheel
WORKDIR /src
RUN python3 -m venv /opt/build
COPY pyproject.toml README.md LICENSE ./
COPY detector detector
COPY service service
RUN /opt/build/bin/pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM ${BASE} AS runtime
# Who publishes the container's port decides who reaches it; with tokens set, OODGATE_ALLOW_OPEN changes nothing.
# A number, because Kubernetes can prove only of a number that it is not root.
RUN groupadd --gid 10001 oodgate \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /opt/oodgate --shell /usr/sbin/nologin oodgate \
    && install --directory --owner=10001 --group=10001 /var/lib/oodgate
COPY --from=dependencies /opt/oodgate/venv /opt/oodgate/venv
ENV PATH=/opt/oodgate/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    OMP_WAIT_POLICY=PASSIVE \
    MALLOC_ARENA_MAX=2 \
    OODGATE_HOST=0.0.0.0 \
    OODGATE_ALLOW_OPEN=true \
    OODGATE_STATE_DIR=/var/lib/oodgate \
    OODGATE_PORT=8000 \
    OODGATE_MODELS=/opt/oodgate/models
# The user of the service must be able to read it, whatever the rights of the files where the image is built.
COPY --chmod=755 models /opt/oodgate/models
# A copy rather than a mount: not every builder notices that a mounted wheel has changed.
COPY --from=wheel /wheels /opt/oodgate/wheels
RUN pip install --no-cache-dir --no-index --no-deps /opt/oodgate/wheels/*.whl
WORKDIR /opt/oodgate
EXPOSE 8000
# The root file system may be read-only: the service writes here, and short-lived files to /tmp.
VOLUME /var/lib/oodgate
# The empty proxy handler: a proxy in the environment must not be asked for the container's own address.
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python3", "-c", "import os, urllib.request as r; r.build_opener(r.ProxyHandler({})).open('http://127.0.0.1:' + os.environ['OODGATE_PORT'] + '/v2/health/ready', timeout=4)"]
ENTRYPOINT ["oodgate"]
CMD ["serve"]

# Triton compiles its launchers with the system's compiler while the service runs, so this target always has one.
FROM runtime AS cuda
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev python3-dev && rm -rf /var/lib/apt/lists/*
ENV OODGATE_DEVICE=cuda \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:10001

FROM runtime AS cpu
ARG COMPILE=""
RUN if [ "${COMPILE}" = 1 ]; then \
        apt-get update && apt-get install --yes --no-install-recommends g++ python3-dev && rm -rf /var/lib/apt/lists/*; \
    fi
ENV OODGATE_DEVICE=cpu
USER 10001:10001
