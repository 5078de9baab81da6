# One image for all services: the API, the workers, maintenance, Flower and the migrations. Only the command differs.
#
#   docker build -t tpo .
#   docker build -t tpo:gpu --build-arg TORCH="torch==2.13.0 --index-url <the index of your CUDA build>" .
FROM python:3.11-slim-bookworm AS build

ARG TORCH="torch==2.13.0"
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/tpo
ENV PATH=/opt/tpo/bin:$PATH

# torch first and in its own layer: it is the largest package and changes least often.
RUN pip install ${TORCH}
WORKDIR /build
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY tpo ./tpo
COPY api ./api
COPY worker ./worker
COPY migrations ./migrations
COPY demo ./demo
RUN grep -v '^torch==' constraints.txt > versions.txt && pip install --constraint versions.txt '.[local]'

FROM python:3.11-slim-bookworm

RUN useradd --create-home --uid 10001 tpo
COPY --from=build /opt/tpo /opt/tpo
ENV PATH=/opt/tpo/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    OMP_WAIT_POLICY=passive \
    HF_HOME=/models
RUN mkdir /models && chown tpo /models
VOLUME /models
WORKDIR /home/tpo
USER tpo
CMD ["python", "-m", "api"]
