#!/bin/sh
# Two machines, PROCESSES on each. Run it on both, with the same FIRST_HOST, and RECORDS and MODEL readable on both:
#
#   FIRST_HOST=10.0.0.1 sh two_hosts.sh 0        on the first, which writes the run folder
#   FIRST_HOST=10.0.0.1 sh two_hosts.sh 1        on the other
set -eu
exec torchrun --nnodes 2 --node-rank "$1" --nproc-per-node "${PROCESSES:-1}" \
    --master-addr "$FIRST_HOST" --master-port "${PORT:-29500}" \
    -m buleyean_rl train "${RECORDS:-records.jsonl}" --model "${MODEL:-smollm2-135m}" -o "${RUN:-run}" ${OPTIONS:-}
