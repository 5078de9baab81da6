# One image for every service: the API, the workers, maintenance, Flower and the migrations differ by their command.
#
#   docker build -t tpo .
#   docker build -t tpo:gpu --build-arg TORCH="torch==2.13.0 --index-url <the index of your CUDA build>" .
FROM python:3.11-slim-bookworm AS build

ARG TORCH="torch==2.13.0"
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
# The build tools have their own environment and are not in the image.
RUN python -m venv /opt/tpo && python -m venv /opt/build
WORKDIR /build

# torch first, by name and in its own layer: it is the largest package and changes least often.
COPY requirements/torch.txt requirements/
RUN /opt/tpo/bin/pip install --require-hashes --requirement requirements/torch.txt \
    && /opt/tpo/bin/pip install ${TORCH}
COPY requirements/local.txt requirements/build.txt requirements/
RUN /opt/tpo/bin/pip install --require-hashes --requirement requirements/local.txt \
    && /opt/build/bin/pip install --require-hashes --requirement requirements/build.txt
COPY pyproject.toml README.md LICENSE ./
COPY tpo ./tpo
COPY api ./api
COPY worker ./worker
COPY migrations ./migrations
COPY demo ./demo
RUN /opt/build/bin/pip wheel --no-deps --no-build-isolation --wheel-dir wheels . \
    && /opt/tpo/bin/pip install --no-deps wheels/tpo-*.whl

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
