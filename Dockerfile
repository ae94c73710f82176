# For CPUs:  docker build --build-arg TORCH_INDEX=<PyTorch's index of CPU wheels> -t varshare_rl .
#            docker run --rm -v "$PWD/runs:/app/runs" varshare_rl train env=mt10
FROM python:3.11-slim-bookworm AS build
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY varshare_rl varshare_rl
COPY configs configs
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.11-slim-bookworm
# Without an index of PyTorch's CPU wheels torch comes with gigabytes of CUDA
ARG TORCH_INDEX=
# MuJoCo draws with this, in memory
RUN apt-get update && apt-get install -y --no-install-recommends libosmesa6 && rm -rf /var/lib/apt/lists/*
COPY constraints.txt /tmp/constraints.txt
RUN pip install --no-cache-dir -c /tmp/constraints.txt ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} torch
RUN --mount=from=build,source=/wheels,target=/wheels \
    pip install --no-cache-dir -c /tmp/constraints.txt ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} \
    "$(echo /wheels/*.whl)[gradient,peft,onnx]"
ENV MUJOCO_GL=osmesa PYTHONUNBUFFERED=1
RUN useradd --create-home --uid 1000 user && mkdir -p /app/runs && chown -R user /app
USER user
WORKDIR /app
ENTRYPOINT ["varshare"]
CMD ["--help"]
