"""One small run of `LDMoLETrainer`, in this process or on ranks, on fixed rows in a fixed order."""

from __future__ import annotations

import tempfile

import torch
from torch.utils.data import SequentialSampler

from ldmole_ds.model.adapter_io import gather_adapter_state
from tests.tiny import ragged_batch, tiny_config, tiny_model

ROWS, STEPS, RATE, SMOOTHING = 24, 3, 1e-3, 0.1


def rows() -> list[dict]:
    batch = ragged_batch(rows=ROWS, seed=5)
    return [{key: value[i] for key, value in batch.items()} for i in range(ROWS)]


def collate(items: list[dict]) -> dict:
    """Cut to the longest row of the micro-batch: ranks and micro-steps then differ in width."""
    batch = {key: torch.stack([item[key] for item in items]) for key in items[0]}
    width = int(batch["attention_mask"].sum(1).max())
    return {key: value[:, -width:] for key, value in batch.items()}


def make_trainer(
    micro: int,
    accumulation: int,
    ds_config: dict | None = None,
    ep_size: int = 1,
    eval_dataset=None,
    *,
    in_order: bool = True,
    lora_dropout: float = 0.0,
    **changes,
):
    """A trainer of eight rows per optimizer step over all ranks; import it where accelerate's state is ready."""
    from ldmole_ds.training.arguments import LDMoLETrainingArguments
    from ldmole_ds.training.trainer import LDMoLETrainer

    class InOrder(LDMoLETrainer):
        def _get_train_sampler(self, *args, **kwargs):
            return SequentialSampler(self.train_dataset)

    values = {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": accumulation,
        "max_steps": STEPS,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "label_smoothing_factor": SMOOTHING,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "eval_on_start": False,
        "remove_unused_columns": False,
        "label_names": ["labels"],
    }
    if ds_config is not None:
        values |= {"deepspeed": ds_config, "accelerator_config": {"use_configured_state": True}}
    model = tiny_model(tiny_config(lora_dropout=lora_dropout), ep_size=ep_size)
    arguments = LDMoLETrainingArguments(**{**values, **changes})
    trainer = InOrder if in_order else LDMoLETrainer
    return trainer(model, arguments, train_dataset=rows(), eval_dataset=eval_dataset, data_collator=collate)


def train(trainer) -> dict:
    """Logged losses and norms of every step, and the adapter at the end."""
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    return {
        "losses": [entry["loss"] for entry in logs],
        "norms": [entry["grad_norm"] for entry in logs],
        "state": gather_adapter_state(trainer.model),
    }


def train_on_ranks(rank: int, world_size: int, cases: list[tuple[int, int, int, int]]) -> list[dict]:
    """Runs of ``(micro, accumulation, ep_size, stage)`` through DeepSpeed."""
    import os

    from accelerate import PartialState
    from accelerate.state import AcceleratorState

    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    PartialState(backend="gloo")
    results = []
    for micro, accumulation, ep_size, stage in cases:
        AcceleratorState._reset_state()  # one Accelerator with a DeepSpeed plugin per state
        config = {
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        results.append(train(make_trainer(micro, accumulation, config, ep_size)))
    return results
