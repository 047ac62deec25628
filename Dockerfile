# One image for all services; compose.yaml says which of them a container runs. docs/compose.md has the build arguments.
ARG PYTHON_IMAGE=python:3.11-slim

# Wheels that pip takes before those of an index; `--build-context wheels=FOLDER` puts another folder in this one's place.
FROM scratch AS wheels
COPY docker/wheels /

FROM ${PYTHON_IMAGE}
ENV OMP_WAIT_POLICY=passive PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
# More arguments for pip, such as the index that has torch's CPU build.
ARG PIP_ARGS=""
# A compiler, with which instances build the native kernels for the processor they find; "" for an image without.
ARG APT_PACKAGES="g++"
RUN [ -z "${APT_PACKAGES}" ] || { apt-get update -q && apt-get install -qy --no-install-recommends ${APT_PACKAGES} && \
    rm -rf /var/lib/apt/lists/*; }
WORKDIR /app

# From what changes least to what changes most, so that new code reinstalls nothing.
COPY requirements.lock ./
RUN --mount=type=bind,from=wheels,target=/wheels \
    pip install --find-links /wheels ${PIP_ARGS} -c requirements.lock torch
COPY pyproject.toml ./
RUN --mount=type=bind,from=wheels,target=/wheels \
    python -c "import tomllib; t = tomllib.load(open('pyproject.toml', 'rb')); \
      print(*t['build-system']['requires'], *t['project']['dependencies'], sep='\n')" >/tmp/requirements.txt && \
    pip install --find-links /wheels ${PIP_ARGS} -c requirements.lock -r /tmp/requirements.txt && \
    rm /tmp/requirements.txt
RUN useradd --create-home --uid 10001 pdserve && install -d -o pdserve -g pdserve /cache \
    /accounts/server /accounts/gateway /accounts/instance /accounts/controller /accounts/operator /accounts/launcher \
    /accounts/client
COPY README.md LICENSE ./
COPY pdserve pdserve/
COPY services services/
COPY shared shared/
COPY models models/
RUN pip install --no-deps --no-build-isolation -e . && python -m compileall -q pdserve services shared

USER pdserve
WORKDIR /home/pdserve
ENV HF_HOME=/cache XDG_CACHE_HOME=/cache
EXPOSE 8000
CMD ["pdserve", "up", "--host", "0.0.0.0"]
