"""One small run of `LDMoLETrainer`, in this process or on ranks, on fixed rows in a fixed order."""

from __future__ import annotations

import tempfile

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import SequentialSampler

from ldmole_ds.model import ldmole_param_groups
from ldmole_ds.model.adapter_io import gather_adapter_state
from tests.tiny import ragged_batch, tiny_config, tiny_model

ROWS, STEPS, RATE, SMOOTHING = 24, 3, 1e-3, 0.1
TOLERANCE = 1e-5


def rows() -> list[dict]:
    batch = ragged_batch(rows=ROWS, seed=5)
    return [{key: value[i] for key, value in batch.items()} for i in range(ROWS)]


def collate(items: list[dict]) -> dict:
    """Cut to the longest row of the micro-batch: ranks and micro-steps then differ in width."""
    batch = {key: torch.stack([item[key] for item in items]) for key in items[0]}
    width = int(batch["attention_mask"].sum(1).max())
    return {key: value[:, -width:] for key, value in batch.items()}


def by_hand(step_rows: list[int], micro_rows: int) -> dict:
    """The same training in a plain loop, the loss written out: rows of every step, and of its micro-steps."""
    model, data = tiny_model().train(), rows()
    config = model.adapter_config
    optimizer = torch.optim.AdamW(ldmole_param_groups(model), lr=RATE)
    parameters = [p for p in model.parameters() if p.requires_grad]
    result = {"losses": [], "norms": []}
    start = 0
    for size in step_rows:
        part = data[start : start + size]
        start += size
        batches = [collate(part[i : i + micro_rows]) for i in range(0, size, micro_rows)]
        items = sum(int(b["labels"][:, 1:].ne(-100).sum()) for b in batches)
        tokens = sum(int(b["attention_mask"].sum()) for b in batches)
        total = 0.0
        for batch in batches:
            outputs = model(
                **batch, num_items_in_batch=items, num_routed_tokens=tokens, gradient_accumulation_steps=len(batches)
            )
            logits, labels = outputs.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
            loss = F.cross_entropy(logits, labels, label_smoothing=SMOOTHING, reduction="sum") / items
            aux = outputs.aux_losses
            loss = loss + config.sparsity_loss_weight * aux["sparsity"]
            loss = loss + config.load_balancing_loss_weight * aux["load_balancing"]
            loss = loss + config.router_z_loss_weight * aux["router_z"]
            loss.backward()
            total += loss.item()
        result["losses"].append(total)
        result["norms"].append(torch.nn.utils.clip_grad_norm_(parameters, 1.0).item())
        optimizer.step()
        optimizer.zero_grad()
    return {**result, "state": gather_adapter_state(model)}


def make_trainer(
    micro: int,
    accumulation: int,
    ds_config: dict | None = None,
    ep_size: int = 1,
    eval_dataset=None,
    *,
    batch_size_warmup=None,
    expert_dispatch: str = "tokens",
    in_order: bool = True,
    lora_dropout: float = 0.0,
    **changes,
):
    """A trainer of eight rows per optimizer step over all ranks; import it where accelerate's state is ready."""
    from ldmole_ds.training.argument_groups import LDMoLETrainingArguments
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
    model = tiny_model(tiny_config(lora_dropout=lora_dropout), ep_size=ep_size, expert_dispatch=expert_dispatch)
    arguments = LDMoLETrainingArguments(**{**values, **changes})
    trainer = InOrder if in_order else LDMoLETrainer
    return trainer(
        model,
        arguments,
        train_dataset=rows(),
        eval_dataset=eval_dataset,
        data_collator=collate,
        batch_size_warmup=batch_size_warmup,
    )


def train(trainer) -> dict:
    """Logged losses and norms of every step, and the adapter at the end."""
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    return {
        "losses": [entry["loss"] for entry in logs],
        "norms": [entry["grad_norm"] for entry in logs],
        "state": gather_adapter_state(trainer.model),
    }


def assert_same(found: dict, expected: dict) -> None:
    assert found["losses"] == pytest.approx(expected["losses"], rel=TOLERANCE)
    assert found["norms"] == pytest.approx(expected["norms"], rel=TOLERANCE)
    for key, value in expected["state"].items():
        difference = (found["state"][key] - value).norm() / value.norm().clamp(min=1e-12)
        assert difference < TOLERANCE, f"{key} differs by {difference:.1e}"


def start_deepspeed_state() -> None:
    """The accelerate state of a rank that trains through DeepSpeed; again before every trainer."""
    import os

    from accelerate import PartialState
    from accelerate.state import AcceleratorState

    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    PartialState(backend="gloo")
    AcceleratorState._reset_state()  # one Accelerator with a DeepSpeed plugin per state


def zero_config(stage: int, **zero) -> dict:
    """A DeepSpeed config that takes what the Trainer fills in."""
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": stage, **zero},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def train_on_ranks(rank: int, world_size: int, cases: list[tuple[int, int, int, int]]) -> list[dict]:
    """Runs of ``(micro, accumulation, ep_size, stage)`` through DeepSpeed."""
    results = []
    for micro, accumulation, ep_size, stage in cases:
        start_deepspeed_state()
        results.append(train(make_trainer(micro, accumulation, zero_config(stage), ep_size)))
    return results
