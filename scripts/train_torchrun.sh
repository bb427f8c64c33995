#!/usr/bin/env bash
# Train a run config with torchrun: DDP, or ZeRO with a DeepSpeed config as an override.
#   scripts/train_torchrun.sh configs/omni_s.yaml
#   PROCESSES=4 scripts/train_torchrun.sh configs/m3.yaml --train.deepspeed configs/zero3.json
set -euo pipefail
config=$1
shift
exec torchrun --standalone --nproc_per_node "${PROCESSES:-2}" -m mllm train --config "$config" "$@"
