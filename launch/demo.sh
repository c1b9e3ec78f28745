#!/usr/bin/env bash
# Fine-tunes the demo model on two ranks, with or without GPUs. Arguments are passed on to launch/train.py.
#
#   bash launch/demo.sh
#
# Sets up a virtual environment first; see launch/setup_venv.sh for which.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/setup_venv.sh
setup_venv "$PWD" demo

# One thread per rank, so that two ranks on two cores do not fight over them.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# Without a GPU, --num_gpus is the number of CPU ranks.
exec deepspeed --num_gpus 2 launch/train.py --deepspeed ds_configs/zero2.json "$@"
