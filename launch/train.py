#!/usr/bin/env python
"""Fine-tune a causal language model with LD-MoLE.

    deepspeed --num_gpus 2 launch/train.py --deepspeed ds_configs/zero2.json

trains the embedded model on the embedded data. See --help, and README.md.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launch.imports import collector_paused
from launch.orphans import watch_launchers

if __name__ == "__main__":
    watch_launchers()
# One progress bar per job. Read by tqdm when it is imported.
if any(os.environ.get(name, "0") != "0" for name in ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")):
    os.environ.setdefault("TQDM_DISABLE", "1")

with collector_paused():
    from ldmole_ds.training.runtime import run_main

# The embedded run: a few minutes on two CPU cores. Any flag overrides any of these.
DEMO_DEFAULTS = {
    "output_dir": "runs/demo",
    "max_steps": 70,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 16,
    "learning_rate": 1.5e-3,
    "lr_scheduler_type": "warmup_stable_decay",
    "lr_scheduler_kwargs": '{"num_decay_steps": 16}',
    "warmup_steps": 4,
    "lora_dropout": 0.0,
    # Half the default: the embedded model is 576 wide, the paper's are 2048 and 3072.
    "lambda_hidden_size": 128,
    "sparsity_loss_weight": 2.0,
    "target_num_experts": 2,
    "save_strategy": "no",
    "logging_steps": 5,
}


def main(argv: list[str]) -> None:
    from ldmole_ds.training.arguments import parse_flags
    from ldmole_ds.training.data import demo_data_defaults
    from ldmole_ds.training.run import train

    train(parse_flags(argv, {**DEMO_DEFAULTS, **demo_data_defaults()}))


if __name__ == "__main__":
    run_main(main)
