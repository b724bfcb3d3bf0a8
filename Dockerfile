# Serves a checkpoint; by default the embedded demo, on a CPU.
#
#   docker build --tag momaserve --build-arg TORCH_INDEX=... .
#   docker build --tag momaserve:cuda --build-arg VARIANT=cuda .
#
# Behind a package index of your own: pass PIP_... build arguments, or a whole pip.conf as the
# secret `pip_conf` if it holds a password (`--secret id=pip_conf,src=pip.conf`). Neither is in
# the final image.
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS dependencies
WORKDIR /build
# cpu: torch without CUDA, from TORCH_INDEX. cuda: torch with CUDA, from the ordinary index.
ARG VARIANT=cpu
# The index of CPU wheels that pytorch.org names for pip; left out, the ordinary index is taken,
# which has CPU builds for some platforms only. A wrong build of torch ends the build.
ARG TORCH_INDEX=
# Optional parts of the project, with blanks between them: otel sends traces.
ARG EXTRAS="otel cpu"
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS
ARG PIP_TRUSTED_HOST
ARG PIP_CERT
ARG PIP_DEFAULT_TIMEOUT
# pip stays here, outside of what is copied into the final image.
RUN python3 -m venv tools && python3 -m venv --without-pip /opt/momaserve
COPY pyproject.toml constraints.txt deploy/container/requirements.py ./
# This layer changes with the dependencies alone, not with the code.
RUN --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    case "${VARIANT}" in cpu) index="${TORCH_INDEX}" ;; cuda) index= ;; \
      *) echo "VARIANT must be cpu or cuda, not '${VARIANT}'" >&2; exit 2 ;; esac \
    && python3 requirements.py list pyproject.toml "${EXTRAS}" > requirements.txt \
    && tools/bin/pip install --no-cache-dir --constraint constraints.txt hatchling \
    && tools/bin/pip --python /opt/momaserve/bin/python install --no-cache-dir \
      --constraint constraints.txt --requirement requirements.txt \
      ${index:+--extra-index-url "${index}"} \
    && /opt/momaserve/bin/python requirements.py check "${VARIANT}" \
    && find /opt/momaserve -depth -type d \( -name tests -o -path '*/torch/test' \) \
      -exec rm -r {} + \
    && find /opt/momaserve -path '*/torch/bin/*' -iname '*test*' -delete

FROM dependencies AS application
COPY README.md LICENSE ./
COPY momaserve momaserve
COPY server server
COPY benchmarks benchmarks
# Below /application lies what the wheel adds to the virtual environment, and nothing else.
RUN tools/bin/pip wheel --no-cache-dir --no-index --no-deps --no-build-isolation \
      --wheel-dir wheels . \
    && tools/bin/pip --python /opt/momaserve/bin/python install --no-cache-dir --no-index \
      --no-deps --root /application wheels/*.whl

FROM ${BASE}
RUN groupadd --gid 10001 momaserve \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp \
      --shell /usr/sbin/nologin momaserve
COPY --from=dependencies /opt/momaserve /opt/momaserve
COPY --from=application /application/opt/momaserve /opt/momaserve
ARG VERSION=dev
ARG REVISION=unknown
ARG SOURCE=
LABEL org.opencontainers.image.title="momaserve" \
      org.opencontainers.image.description="Inference and serving engine for modality-aware sparse models" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.source="${SOURCE}"
# The root file system may be read-only: nothing is compiled to .pyc at run time, and caches that
# torch may want go to /tmp.
ENV PATH=/opt/momaserve/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp \
    TORCHINDUCTOR_CACHE_DIR=/tmp/torchinductor \
    TRITON_CACHE_DIR=/tmp/triton \
    NUMBA_CACHE_DIR=/tmp/numba \
    MOMASERVE_HOST=0.0.0.0 \
    MOMASERVE_PORT=8000
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 \
  CMD ["python3", "-c", "import os, urllib.request; urllib.request.urlopen('http://127.0.0.1:' + os.environ['MOMASERVE_PORT'] + '/health', timeout=4)"]
ENTRYPOINT ["momaserve"]
CMD ["serve"]
