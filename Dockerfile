# l4queue in containers. Targets, from small to large:
#   client      the Python client and the command line
#   services    dispatcher, planner, beat, Flower, workers with the emulated or the http engine; no torch, no vLLM
#   worker-cpu  workers with the CPU build of vLLM
#   worker-gpu  workers with the GPU build of vLLM; the host brings the driver and NVIDIA's container toolkit
#
# BASE_IMAGE is any Debian with Python 3.11 to 3.13 and venv. BUILD_IMAGE is where packages are installed: the
# same Python in the same place, with pip's configuration where a site needs one; nothing of it ends in an image.
ARG BASE_IMAGE=python:3.11-slim-bookworm
ARG BUILD_IMAGE=${BASE_IMAGE}

FROM ${BUILD_IMAGE} AS build
WORKDIR /build
COPY requirements/tools.txt requirements/
RUN python3 -m venv /opt/tools && /opt/tools/bin/pip install --quiet --no-cache-dir -r requirements/tools.txt \
    && python3 -m venv --without-pip /opt/l4queue
ENV UV="/opt/tools/bin/uv pip" UV_NO_CACHE=1 UV_COMPILE_BYTECODE=1 UV_LINK_MODE=copy VIRTUAL_ENV=/opt/l4queue
COPY requirements/ requirements/

FROM build AS wheel
COPY pyproject.toml README.md LICENSE ./
COPY l4queue/ l4queue/
COPY dispatcher/ dispatcher/
COPY workers/ workers/
COPY gateway/ gateway/
RUN /opt/tools/bin/pip wheel --quiet --no-cache-dir --no-deps --wheel-dir /dist .

FROM build AS build-client
RUN $UV install --quiet --no-deps -r requirements/base.txt
COPY --from=wheel /dist/ /dist/
RUN $UV install --quiet --no-deps /dist/*.whl

FROM build AS build-services
RUN $UV install --quiet --no-deps -r requirements/services.txt
COPY --from=wheel /dist/ /dist/
RUN $UV install --quiet --no-deps /dist/*.whl

# What every image has: a user of its own, and the directories that volumes are mounted on, which take their owner.
FROM ${BASE_IMAGE} AS base
RUN groupadd --gid 10001 l4queue \
    && useradd --uid 10001 --gid 10001 --create-home --shell /usr/sbin/nologin l4queue \
    && install -d -o l4queue -g l4queue /home/l4queue/.cache /var/lib/l4queue /var/lib/l4queue/devices \
        /var/lib/l4queue/files
ENV PATH=/opt/l4queue/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    PYTHONWARNINGS="ignore:You're running the worker"
WORKDIR /home/l4queue
USER 10001:10001

FROM base AS client
COPY --from=build-client /opt/l4queue /opt/l4queue
ENTRYPOINT ["l4queue"]

FROM base AS services
COPY --from=build-services /opt/l4queue /opt/l4queue

FROM build AS build-cpu
# By pip first, because only pip knows a CPU build of torch that its configuration points to: see the Makefile.
RUN python3 -m venv --upgrade /opt/l4queue \
    && (/opt/l4queue/bin/pip install --quiet --no-cache-dir --no-deps -r requirements/torch-cpu.txt 2>/dev/null \
        || $UV install --quiet --no-deps --torch-backend cpu -r requirements/torch-cpu.txt)
RUN $UV install --quiet --no-deps -r requirements/cpu.txt
COPY --from=wheel /dist/ /dist/
RUN $UV install --quiet --no-deps /dist/*.whl

FROM base AS worker-cpu
USER root
RUN apt-get update -qq \
    && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends libnuma1 \
    && rm -rf /var/lib/apt/lists/*
USER 10001:10001
COPY --from=build-cpu /opt/l4queue /opt/l4queue
ENV L4_DEVICES_DIR=/var/lib/l4queue/devices
CMD ["python", "-m", "workers"]

FROM build AS build-gpu
RUN $UV install --quiet --no-deps -r requirements/gpu.txt
COPY --from=wheel /dist/ /dist/
RUN $UV install --quiet --no-deps /dist/*.whl

FROM base AS worker-gpu
USER root
# Triton compiles its launchers on the machine that runs them: a compiler, and Python's headers where they lack.
RUN apt-get update -qq \
    && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends gcc g++ libc6-dev libnuma1 \
    && { test -e "$(python3 -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" \
        || apt-get install -qq -y --no-install-recommends python3-dev; } \
    && rm -rf /var/lib/apt/lists/*
USER 10001:10001
COPY --from=build-gpu /opt/l4queue /opt/l4queue
ENV L4_DEVICES_DIR=/var/lib/l4queue/devices \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
CMD ["python", "-m", "workers"]
