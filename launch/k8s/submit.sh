#!/usr/bin/env bash
# Submits launch/k8s/pytorchjob.yaml or mpijob.yaml. Further arguments go to launch/train.py.
#
#   bash launch/k8s/submit.sh pytorchjob --dry_run          # print the job and the exact command
#   NODES=4 bash launch/k8s/submit.sh mpijob --learning_rate 2e-4
# shellcheck disable=SC2034  # read by name below
set -euo pipefail

# ---- What to run: each can also be set from outside --------------------------------------------------------------------
NAME=${NAME:-ldmole}
NAMESPACE=${NAMESPACE:-default}
IMAGE=${IMAGE:-registry.example.com/ldmole:latest}        # built from launch/k8s/Dockerfile
NODES=${NODES:-2}                                         # pods with GPUs
GPUS=${GPUS:-8}                                           # per pod
CLAIM=${CLAIM:-ldmole-data}                               # a volume claim with accessMode ReadWriteMany, seen as /data
OUTPUT_DIR=${OUTPUT_DIR:-/data/runs/$NAME}                # on that volume: all ranks write checkpoints to it
HF_HOME=${HF_HOME_IN_POD:-/data/huggingface}              # models and data sets, filled beforehand where pods are offline
HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-0}                       # 1: take everything from there
TRAIN_ARGS=${TRAIN_ARGS---deepspeed ds_configs/zero2_bf16.json --bf16}
# -------------------------------------------------------------------------------------------------------------------------

kind=${1:-}
[[ $kind == pytorchjob || $kind == mpijob ]] || { echo "usage: $0 pytorchjob|mpijob [--dry_run] [flags]" >&2; exit 2; }
shift
dry_run=
[[ ${1:-} == --dry_run ]] && dry_run=1 && shift
[[ $kind == mpijob || $NODES -gt 1 ]] || { echo "a PyTorchJob of one pod has no workers: set NODES to 2 or more" >&2; exit 2; }

# Quoted, since a shell in the pod reads them: --target_modules '.*layers\.2\d.*' arrives as it is.
(($#)) && TRAIN_ARGS+=$(printf ' %q' "$@")
WORKERS=$((NODES - 1))
RANKS=$((NODES * GPUS))
text=$(cat "$(dirname "${BASH_SOURCE[0]}")/$kind.yaml")
for name in NAME NAMESPACE IMAGE NODES GPUS CLAIM OUTPUT_DIR HF_HOME HF_HUB_OFFLINE TRAIN_ARGS WORKERS RANKS; do
    text=${text//"\${$name}"/"${!name}"}
done

if [[ -n $dry_run ]]; then
    echo "# kubectl apply -f - <<'EOF'"
    printf '%s\n' "$text"
    echo "# EOF"
    exit
fi
kubectl apply -f - <<< "$text"
