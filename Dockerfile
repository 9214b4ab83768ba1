# buleyean-rl on a CPU.
#
#   docker build --tag buleyean .
#   docker run --rm -it -v "$PWD:/data" -v buleyean-cache:/home/buleyean/.cache buleyean train records.jsonl \
#       --model smollm2-135m -o my-run
#
# Files you name are those of the folder mounted at /data, which the user in the image must be able to write:
# `--build-arg UID="$(id -u)"`. Converted models, kernels and answers stay in the volume.
FROM python:3.11-slim

# The compiler is there to stay: kernels are compiled for the processor that compiles them, and where the image was built
# on another kind they are compiled again on first use, in half a minute.
RUN apt-get update \
 && apt-get install --yes --no-install-recommends gcc libc6-dev \
 && rm -rf /var/lib/apt/lists/*

# The CPU build of torch.
ARG PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
ARG PIP_NO_CACHE_DIR=1
WORKDIR /opt/buleyean-rl
COPY install.sh requirements.lock pyproject.toml README.md LICENSE ./
COPY src src
RUN sh install.sh python '.[language,void]'

ARG UID=1000
RUN useradd --create-home --uid "$UID" buleyean && mkdir /data && chown buleyean /data
USER buleyean
WORKDIR /data
ENV PYTHONUNBUFFERED=1

# Compiles the kernels, and leaves in the build's log what they are for.
RUN buleyean doctor --need bundled-model --need void
VOLUME /home/buleyean/.cache

ENTRYPOINT ["buleyean"]
CMD ["--help"]
