# kdjax with the tested versions of its packages, as a user without rights:
#   docker build --tag kdjax .                             # for the CPU
#   docker build --tag kdjax:cuda --build-arg EXTRAS=export,cuda13 .   # for NVIDIA GPUs: docker run --gpus=all ...
#   docker run --rm --volume "$PWD/runs:/runs" kdjax train --config=quickstart --workdir=/runs/quickstart
FROM python:3.13-slim

ARG EXTRAS=export
# As whom to run, so that files in mounted folders belong to you: --build-arg UID=$(id -u)
ARG UID=1000

WORKDIR /opt/kdjax
COPY constraints/py313.txt constraints/
COPY pyproject.toml README.md LICENSE ./
COPY assets assets
COPY configs configs
COPY kdjax kdjax
RUN pip install --no-cache-dir --constraint constraints/py313.txt ".[${EXTRAS}]" \
    && useradd --create-home --uid "${UID}" kdjax \
    && install --directory --owner=kdjax /runs /cache

USER ${UID}
# Prepared data and compiled programs; a volume keeps them: --volume kdjax-cache:/cache
ENV KDJAX_CACHE=/cache
WORKDIR /runs
ENTRYPOINT ["kdjax"]
CMD ["--help"]
