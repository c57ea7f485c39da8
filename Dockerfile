# One image per service:
#
#   docker build --build-arg SERVICE=gateway -t sandbox-broker/gateway .
#
# SERVICE is gateway, allocator, reaper, csp-syncer, provisioner or console. Each image also contains
# python -m sandbox_broker.declare, and the images of gateway and allocator python -m sandbox_broker.migrate. An image
# runs as user 10001 and writes no files, so the root file system may be read-only.

ARG PYTHON_IMAGE=python:3.13-slim

FROM ${PYTHON_IMAGE} AS build
ARG SERVICE
# Package directory and locked requirements. docker-compose.yml overrides both for the CSP simulator.
ARG SOURCE=services/${SERVICE}
ARG LOCK=requirements/${SERVICE}.txt
COPY ${LOCK} /tmp/requirements.txt
# The image's environment contains no installer and only packages that are locked by hash.
RUN python3 -m venv --without-pip /opt/venv \
 && python3 -m pip --python /opt/venv/bin/python --disable-pip-version-check install \
        --no-cache-dir --no-compile --only-binary :all: --require-hashes -r /tmp/requirements.txt
COPY shared/ ${SOURCE}/ deploy/image/ /opt/broker/
# The files for browsers, for the console only. Node.js and npm come from a wheel and do not reach the final image.
COPY requirements/npm.txt /tmp/npm.txt
RUN if [ -f /opt/broker/build_assets.py ]; then \
        python3 -m pip --disable-pip-version-check install --no-cache-dir --no-compile --only-binary :all: \
            --require-hashes --target /tmp/npm -r /tmp/npm.txt \
     && python3 /opt/broker/build_assets.py /tmp/npm \
     && rm -rf /tmp/npm /opt/broker/node_modules /opt/broker/build_assets.py /opt/broker/package*.json; \
    fi
# Compile here, because the final image cannot write bytecode.
RUN python3 -m compileall -q -j 0 /opt/venv/lib /opt/broker

FROM ${PYTHON_IMAGE}
ARG SERVICE
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="Sandbox Broker: ${SERVICE}" \
      org.opencontainers.image.description="Leases pre-created Infoblox CSP accounts to Instruqt students" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
# Remove the base image's installer: no service needs it, and an intruder could use it.
RUN rm -rf /usr/local/lib/python3*/site-packages/pip /usr/local/lib/python3*/site-packages/pip-* \
        /usr/local/lib/python3*/ensurepip /usr/local/bin/pip*
COPY --from=build /opt/venv /opt/venv
COPY --from=build /opt/broker /opt/broker
ENV SERVICE=${SERVICE} \
    PATH=/opt/venv/bin:${PATH} \
    PYTHONPATH=/opt/broker \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/opt/broker \
    GATEWAY_PORT=8080 \
    ALLOCATOR_PORT=9101 \
    REAPER_PORT=9102 \
    CSP_SYNCER_PORT=9103 \
    PROVISIONER_PORT=9104 \
    CONSOLE_PORT=9105 \
    CSP_SIMULATOR_PORT=9200
WORKDIR /opt/broker
USER 10001:10001
HEALTHCHECK --interval=10s --timeout=5s --start-period=15s --retries=3 CMD ["python", "/opt/broker/healthy.py"]
ENTRYPOINT ["python", "/opt/broker/serve.py"]
