#!/usr/bin/env bash
# Fine-tunes over several hosts with mpirun (Open MPI), one rank per GPU. Further arguments go to launch/train.py.
#
#   bash launch/mpi/train.sh --dry_run                      # print the exact command
#   HOSTS=node1:8,node2:8 bash launch/mpi/train.sh --learning_rate 2e-4
#
# Needs: passwordless ssh from here to every host; the same checkout, environment and OUTPUT_DIR at the same paths on all
# of them; mpi4py (pip install 'ldmole_ds[mpi]' brings an MPI too), or MASTER_ADDR set to the first host.
set -euo pipefail

# ---- What to run: each can also be set from outside --------------------------------------------------------------------
HOSTS=${HOSTS:-localhost:2}                               # host:ranks,host:ranks,...
REPO=${REPO:-$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)}
PYTHON=${PYTHON:-python}                                  # absolute for an environment that ssh does not activate
MPIRUN=${MPIRUN:-mpirun}
OUTPUT_DIR=${OUTPUT_DIR:-$REPO/runs/mpi}                  # shared by all hosts: checkpoints are written by all ranks
HF_HOME=${HF_HOME:-$HOME/.cache/huggingface}              # models and data sets, filled beforehand where hosts are offline
HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-0}                       # 1: take everything from HF_HOME
NETWORK=${NETWORK:-}                                      # MPI's own traffic, e.g. 10.0.0.0/24 or eth0; empty: MPI chooses
TRAIN_ARGS=${TRAIN_ARGS---deepspeed ds_configs/zero2_bf16.json --bf16}
# -------------------------------------------------------------------------------------------------------------------------

dry_run=
[[ ${1:-} == --dry_run ]] && dry_run=1 && shift

ranks=0
IFS=, read -ra hosts <<< "$HOSTS"
for host in "${hosts[@]}"; do
    [[ $host == *:* ]] || { echo "HOSTS: $host has no number of ranks; write $host:8" >&2; exit 2; }
    ranks=$((ranks + ${host##*:}))
done

# Ranks are placed in order, host by host: consecutive ranks share experts, and should share a host.
command=("$MPIRUN" -n "$ranks" --host "$HOSTS" --map-by "slot:OVERSUBSCRIBE" --bind-to none -wdir "$REPO")
[[ -n $NETWORK ]] && command+=(--mca btl_tcp_if_include "$NETWORK" --prtemca prte_if_include "$NETWORK")
[[ $(id -u) == 0 ]] && command+=(--allow-run-as-root)
export HF_HOME HF_HUB_OFFLINE TOKENIZERS_PARALLELISM=false
for name in PATH HF_HOME HF_HUB_OFFLINE TOKENIZERS_PARALLELISM HF_TOKEN MASTER_ADDR MASTER_PORT OMP_NUM_THREADS \
    DS_ACCELERATOR LD_LIBRARY_PATH NCCL_DEBUG NCCL_SOCKET_IFNAME NCCL_IB_HCA; do
    [[ -n ${!name:-} ]] && command+=(-x "$name")
done
read -ra train_args <<< "$TRAIN_ARGS"
command+=("$PYTHON" -u launch/train.py ${train_args[@]+"${train_args[@]}"} --resume auto --output_dir "$OUTPUT_DIR" "$@")

if [[ -n $dry_run ]]; then
    printf '%q ' "${command[@]}"
    echo
    exit
fi
mkdir -p "$OUTPUT_DIR"
exec "${command[@]}"
