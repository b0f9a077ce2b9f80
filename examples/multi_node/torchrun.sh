#!/usr/bin/env bash
# Starts one node's processes. Run it on every node, with the same settings and the arguments of `train.py fit`:
#
#   MASTER=node1:29500 NNODES=2 examples/multi_node/torchrun.sh \
#       --config genlora:llama-70b --config examples/multi_node/two_nodes.yaml --config my_task.yaml
#
# If a process dies, all of them are started again, up to MAX_RESTARTS times; with `ckpt_path: auto` they go on from the
# last checkpoint.
#
#   MASTER          host:port of one of the nodes, where all meet; the port must be free    (needed)
#   NNODES          number of nodes                                                         [2]
#   GPUS_PER_NODE   processes on each node                                                  [8]
#   MAX_RESTARTS    how often to start again                                                [3]
#   RUN_ID          a name that this run's nodes share                                      [genlora]
#   PYTHON          the interpreter                                                         [python]
set -euo pipefail
: "${MASTER:?host:port of one of the nodes}"
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
exec "${PYTHON:-python}" -m torch.distributed.run \
  --nnodes "${NNODES:-2}" \
  --nproc_per_node "${GPUS_PER_NODE:-8}" \
  --rdzv_backend c10d \
  --rdzv_endpoint "$MASTER" \
  --rdzv_id "${RUN_ID:-genlora}" \
  --max-restarts "${MAX_RESTARTS:-3}" \
  train.py fit "$@"
