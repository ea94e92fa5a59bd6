# syntax=docker/dockerfile:1
# One source, two images:
#   service  everything on a CPU: server, beat, migrate, and the worker of a host without a GPU
#   worker   the same with PyTorch's CUDA build, for hosts with a GPU (2 to 3 GB more)
# Build one by hand with: docker build --target service -t lomo-server .

FROM python:3.12-slim AS build
ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/lomo
ENV PATH="/opt/lomo/bin:$PATH"
WORKDIR /src

# PyTorch first and by itself: it is most of the image and changes least. The range is that of pyproject.toml.
FROM build AS build-cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install --index-url "$TORCH_INDEX" "torch>=2.6,<2.14"
COPY . .
RUN pip install '.[s3,wandb,mlflow]'

FROM build AS build-cuda
ARG TORCH_CUDA_INDEX=https://pypi.org/simple
RUN pip install --index-url "$TORCH_CUDA_INDEX" "torch>=2.6,<2.14"
COPY . .
RUN pip install '.[s3,wandb,mlflow]'

FROM python:3.12-slim AS runtime
# A fixed number, so that a volume belongs to the same user in every version of the image.
RUN groupadd --gid 10001 lomo \
    && useradd --uid 10001 --gid lomo --no-create-home --home-dir /tmp --shell /usr/sbin/nologin lomo \
    && install --directory --owner lomo --group lomo --mode 0700 /var/lib/lomo /var/lib/lomo-keys
# HOME and the caches lie in /tmp, because the file system of a container is read-only in docker-compose.yml.
ENV PATH="/opt/lomo/bin:$PATH" \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp \
    XDG_CACHE_HOME=/tmp/cache
WORKDIR /
USER 10001:10001

FROM runtime AS worker
COPY --from=build-cuda /opt/lomo /opt/lomo
CMD ["python", "-m", "celery", "-A", "worker.app", "worker", "--pool=threads", "--queues=jobs,control", \
     "--without-gossip", "--without-mingle", "--loglevel=INFO", "--hostname=lomo@%h", "--concurrency=2"]

# The last stage is what `docker build .` makes.
FROM runtime AS service
COPY --from=build-cpu /opt/lomo /opt/lomo
EXPOSE 8000
# The server is asked from inside; the other services of this image switch this off in docker-compose.yml.
HEALTHCHECK --interval=10s --timeout=6s --start-period=30s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/readyz', timeout=5)"]
CMD ["python", "-m", "server"]
