# The server and its page, for a CPU or for NVIDIA GPUs:
#
#   docker build -t ldm2 .
#   docker build -t ldm2:cuda --build-arg VARIANT=cuda .
#   docker run --rm -p 127.0.0.1:8000:8000 -e LDM2_API_KEY=choose-one -v ldm2-models:/models ldm2
#   docker run --rm --gpus all ... ldm2:cuda serve --host 0.0.0.0 --port 8000 --model audioldm2
#
# Then open http://127.0.0.1:8000. Weights are kept in the volume. docs/guides/where.md has more.
ARG PYTHON=3.13
ARG VARIANT=cpu

FROM python:${PYTHON}-slim AS base
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1

FROM base AS torch-cpu
RUN pip install "torch==2.13.0" --index-url https://download.pytorch.org/whl/cpu
ENV EXTRAS=ui LDM2_BUILD_KERNELS=1

FROM base AS torch-cuda
RUN pip install "torch==2.13.0"
ENV EXTRAS=ui,kernels LDM2_BUILD_KERNELS=0

# Compilers stay behind in this stage.
FROM torch-${VARIANT} AS build
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY setup.py pyproject.toml MANIFEST.in README.md LICENSE ./
COPY ldm2 ldm2
COPY kernels kernels
RUN pip wheel --no-deps --wheel-dir /wheels .

FROM torch-${VARIANT}
COPY constraints.txt /constraints.txt
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
    pip install -c /constraints.txt "$(echo /wheels/*.whl)[${EXTRAS}]"
RUN useradd --create-home --uid 1000 ldm2 && mkdir /models && chown ldm2 /models
USER ldm2
WORKDIR /home/ldm2
ENV HF_HOME=/models OMP_WAIT_POLICY=passive
VOLUME /models
EXPOSE 8000
HEALTHCHECK --start-period=5m --interval=30s --timeout=5s \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["ldm2"]
CMD ["serve", "--host", "0.0.0.0", "--port", "8000", "--model", "tiny"]
