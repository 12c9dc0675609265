# saesteer on a CPU (the default) or on CUDA:
#
#   docker build -t saesteer .
#   docker build -t saesteer:cuda --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128 .
#   docker run --rm -v "$PWD/runs:/data/runs" saesteer demo --quick -o runs/first
#   docker run --rm --gpus all -v "$PWD/runs:/data/runs" saesteer:cuda doctor --layer 20
#
# The wheels of PyTorch bring CUDA themselves, so one base image serves both.
ARG PYTHON=3.12
FROM python:${PYTHON}-slim AS wheel
WORKDIR /src
COPY . .
RUN pip install --no-cache-dir build && python -m build --wheel --outdir /wheels

FROM python:${PYTHON}-slim
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# A C++ compiler for --compile (torch.compile) and Triton; dictionaries for the grades of translations.
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ dict-freedict-eng-fra dict-freedict-fra-eng \
    && rm -rf /var/lib/apt/lists/*
# PyTorch first and from its own index: the default wheels for Linux are those with CUDA.
RUN pip install --no-cache-dir --index-url "${TORCH_INDEX}" "torch>=2.8,<2.14"
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    pip install --no-cache-dir /wheels/*.whl
RUN useradd --create-home user
USER user
WORKDIR /data
ENV SAESTEER_CACHE=/home/user/.cache/saesteer
ENTRYPOINT ["saesteer"]
CMD ["--help"]
