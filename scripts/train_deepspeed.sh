#!/usr/bin/env bash
# Train a run config with DeepSpeed's launcher; it takes machines from a hostfile (deepspeed --hostfile ...).
#   ZERO=3 PROCESSES=8 scripts/train_deepspeed.sh configs/m3.yaml
set -euo pipefail
config=$1
shift
exec deepspeed --num_accelerators "${PROCESSES:-2}" --no_local_rank --module mllm \
    train --config "$config" --train.deepspeed "configs/zero${ZERO:-2}.json" "$@"
