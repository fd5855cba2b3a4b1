# The owner's commands in a small image without torch: mask, export-proxy, audit (weights and exposure), merge, sign, seal.
#
#   docker build -t fedqsn .
#   docker run --rm --network none -v "$PWD:/work" fedqsn export-proxy global --out proxy ...
#
# Clients train with `python -m pip install fedqsn-cli`, which has torch. Tags of images move: to build the same image
# again, give the digest of the base that you have checked, as your container tool prints it:
#
#   docker pull python:3.12-slim
#   docker image inspect --format '{{index .RepoDigests 0}}' python:3.12-slim
#   docker build --build-arg BASE=python@sha256:... -t fedqsn .
ARG BASE=python:3.12-slim
FROM $BASE

COPY constraints.txt pyproject.toml README.md LICENSE /source/
COPY src /source/src
# What the owner's commands import, at the pinned versions; then the package itself, without what only training needs.
RUN python -m pip install --no-cache-dir -c /source/constraints.txt \
        blake3 cryptography huggingface_hub Jinja2 llvmlite numba numpy pydantic rich safetensors scipy threadpoolctl typer \
    && python -m pip install --no-cache-dir --no-deps /source \
    && rm -rf /source

RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin fedqsn
USER fedqsn
WORKDIR /work
ENV NUMBA_CACHE_DIR=/tmp/numba PYTHONDONTWRITEBYTECODE=1
ENTRYPOINT ["fedqsn"]
CMD ["--help"]
