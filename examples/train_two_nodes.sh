#!/bin/sh
# Two nodes by hand: on each of them, with the same ADDRESS (of the first node) and all else the same:
#
#     ADDRESS=10.0.0.1 sh examples/train_two_nodes.sh --preset small --data corpus --out /shared/run
#
# PROCESSES of a node (8), NODES (2) and PORT (29500) are variables too. The folders must be the same on all nodes.
set -e

exec torchrun \
    --nnodes "${NODES:-2}" --nproc-per-node "${PROCESSES:-8}" \
    --rdzv-id "${JOB:-loopmdm}" --rdzv-backend c10d --rdzv-endpoint "${ADDRESS:?address of the first node}:${PORT:-29500}" \
    -m loopmdm train --resume --parallel "${PARALLEL:-hsdp}" "$@"
