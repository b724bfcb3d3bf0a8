# CPU image that serves the embedded demo. Build: docker build -t momaserve .
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS build
WORKDIR /src
RUN python3 -m venv /opt/momaserve
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY momaserve momaserve
COPY server server
COPY benchmarks benchmarks
RUN /opt/momaserve/bin/pip install --no-cache-dir --constraint constraints.txt .

FROM ${BASE}
RUN useradd --system --uid 10001 --no-create-home momaserve
COPY --from=build /opt/momaserve /opt/momaserve
ENV PATH=/opt/momaserve/bin:$PATH PYTHONUNBUFFERED=1
USER 10001
EXPOSE 8000
HEALTHCHECK --start-period=60s CMD ["python3", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health', timeout=5)"]
ENTRYPOINT ["momaserve", "serve", "--host", "0.0.0.0"]
