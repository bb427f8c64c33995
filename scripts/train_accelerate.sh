#!/usr/bin/env bash
# Train a run config with accelerate: DDP by default, or ZeRO with LAUNCHER=zero2 or LAUNCHER=zero3.
#   scripts/train_accelerate.sh configs/omni_s.yaml --train.out runs/mine
#   LAUNCHER=zero3 PROCESSES=8 scripts/train_accelerate.sh configs/m3.yaml
set -euo pipefail
config=$1
shift
exec accelerate launch --config_file "configs/accelerate_${LAUNCHER:-ddp}.yaml" --num_processes "${PROCESSES:-2}" \
    -m mllm train --config "$config" "$@"
