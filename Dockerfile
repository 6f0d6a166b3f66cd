# Two images of one file:
#   docker build --target cpu  -t flm_torchrec:cpu .       serving; training on CPUs
#   docker build --target cuda -t flm_torchrec:latest .    training on GPUs: the image that launch/components.py names
# torch brings CUDA's libraries; the host needs a driver and NVIDIA's container toolkit.
# --build-arg BASE=… takes another image with Python 3.11 or newer and pip.
ARG BASE=python:3.12-slim

FROM ${BASE} AS wheel
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY configs configs
COPY launch launch
COPY flm_torchrec flm_torchrec
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

# What both images share: no compiler, no tests; an own user; configs where jobs look for them.
FROM ${BASE} AS base
ENV PYTHONUNBUFFERED=1 HOME=/tmp
# A new volume gets the owner of the folder that it is mounted at: /shop, of compose.yaml.
RUN useradd --uid 10001 --no-create-home flm && mkdir --parents /app /shop && chown flm /app /shop
COPY requirements /requirements
WORKDIR /app
COPY configs configs
# Without an entry point, as torchx starts torchrun.
CMD ["flm", "--help"]

FROM base AS cpu
ARG TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu
RUN torch="$(grep '^torch==' /requirements/cpu.txt)+cpu" \
    && pip install --no-cache-dir --extra-index-url "$TORCH_CPU_INDEX" --constraint /requirements/base.txt "$torch"
COPY --from=wheel /wheels /wheels
RUN pip install --no-cache-dir --extra-index-url "$TORCH_CPU_INDEX" \
        --constraint /requirements/base.txt --constraint /requirements/extras.txt \
        "$(echo /wheels/*.whl)[cpu,kafka,avro,qdrant,postgresql,pgvector,traces]" \
    && pip install --no-cache-dir --no-deps "$(grep '^torchrec==' /requirements/cpu.txt)" \
    && flm --version
# A number, as Kubernetes cannot know by a name that it is not root.
USER 10001

FROM base AS cuda
RUN pip install --no-cache-dir --constraint /requirements/base.txt "$(grep '^torch==' /requirements/gpu.txt)"
COPY --from=wheel /wheels /wheels
# No `flm --version` here: the package does not load without a driver.
RUN pip install --no-cache-dir --constraint /requirements/base.txt --constraint /requirements/extras.txt \
        "$(echo /wheels/*.whl)[gpu,kafka,avro,qdrant,postgresql,pgvector,traces]"
# A number, as Kubernetes cannot know by a name that it is not root.
USER 10001
