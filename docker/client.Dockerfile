# A client of somebody's federation (docs/guide/deploy.md). From the repository:
#
#   docker build -f docker/client.Dockerfile -t fedms-client .
#   docker run --rm -it -v "$PWD:/data:ro" -v fedms-client:/state fedms-client \
#     join /data/invite.toml --data /data/cases.csv --name clinic-7 --state /state/clinic-7
#   docker run -d --restart unless-stopped -v fedms-client:/state fedms-client start /state/clinic-7
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
    pip install --no-cache-dir "$TORCH" && pip install --no-cache-dir "$(echo /wheels/fedms-*.whl)[client]"
USER 1000
WORKDIR /state
VOLUME /state
STOPSIGNAL SIGINT
ENTRYPOINT ["fedms", "client"]
CMD ["--help"]
