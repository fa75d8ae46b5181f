# The server of a federation (docs/guide/deploy.md). From the repository:
#
#   docker build -f docker/server.Dockerfile -t fedms-server .
#   docker run --rm -v "$PWD:/data:ro" -v fedms-server:/state fedms-server \
#     init /state/federation /data/my-run.toml --host fl.example.org
#   docker run --rm -v fedms-server:/state fedms-server accept /state/federation 'ecdsa-sha2-nistp384 AAAA... clinic-7'
#   docker run -d --restart on-failure -p 9091:9091 -v fedms-server:/state fedms-server \
#     start /state/federation --bind 0.0.0.0
#
# TORCH is what pip is given for PyTorch; with another index (PIP_INDEX_URL) a build without CUDA takes a tenth of the space.
FROM python:3.12-slim-bookworm AS wheel
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
COPY . /source
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels /source

FROM python:3.12-slim-bookworm
ARG TORCH=torch==2.13.0
ARG PIP_INDEX_URL
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends libgomp1 && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 fedms \
    && install -d -m 700 -o fedms -g fedms /state
# hadolint ignore=DL3013
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    pip install --no-cache-dir "$TORCH" && pip install --no-cache-dir "$(echo /wheels/fedms-*.whl)[train,flower]"
USER 1000
WORKDIR /state
VOLUME /state
EXPOSE 9091
STOPSIGNAL SIGINT
ENTRYPOINT ["fedms", "server"]
CMD ["--help"]
