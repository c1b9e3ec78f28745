"""The same training through DeepSpeed, in any layout. Collective: every rank runs the same cells in the same order."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist

from ldmole_ds.distributed.zero import partitioned_init
from ldmole_ds.model import LDMoLEModel, ldmole_param_groups
from ldmole_ds.model.adapter_io import gather_adapter_state
from ldmole_ds.parity.cells import ROUTERS, Cell
from ldmole_ds.parity.dense import CLIP, LEARNING_RATE, ROWS_PER_MICRO_STEP, STEPS, WEIGHT_DECAY, Run, micro_batches
from ldmole_ds.parity.model import copy_weights, small_config, small_llama, small_model

_UNEVEN_ROWS = {2: [5, 3], 4: [3, 1, 2, 2]}


def rows_of_ranks(world_size: int) -> list[int]:
    """Rows that each rank takes of a micro-step: of eight, or of as many as there are ranks; none goes empty."""
    rows = max(ROWS_PER_MICRO_STEP, world_size)
    even = [len(range(rank, rows, world_size)) for rank in range(world_size)]
    return _UNEVEN_ROWS.get(world_size, even)


def ds_config(cell: Cell) -> dict:
    """The DeepSpeed config of a cell."""
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": cell.accumulation,
        "gradient_clipping": CLIP,
        "zero_optimization": {"stage": cell.zero_stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if cell.offload:
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    if cell.dtype == "bf16":
        config["bf16"] = {"enabled": True}
    if cell.optimizer == "config":
        params = {"lr": LEARNING_RATE, "weight_decay": WEIGHT_DECAY, "torch_adam": True}
        config["optimizer"] = {"type": "AdamW", "params": params}
    return config


def build_model(cell: Cell, config: dict) -> LDMoLEModel:
    """The small model in the layout of a cell; the base partitioned from the start for ``3 zero.Init``."""
    dtype = torch.bfloat16 if cell.dtype == "bf16" else torch.float32
    base = small_llama().to(dtype)
    if cell.stage == "3 zero.Init":
        whole = base
        with partitioned_init(config):
            base = small_llama().to(dtype)
        copy_weights(whole, base)
    adapter = small_config(lora_dropout=cell.dropout, **ROUTERS[cell.router])
    model = small_model(adapter, ep_size=cell.ep_size, expert_dispatch=cell.expert_dispatch, base=base)
    if cell.checkpointing:
        base.config.use_cache = False
        model.gradient_checkpointing_enable()
    return model


def build_engine(cell: Cell) -> Any:
    """The small model in the layout of a cell, in DeepSpeed's engine; ``engine.module`` is the model."""
    import deepspeed

    config = ds_config(cell)
    model = build_model(cell, config)
    groups = ldmole_param_groups(model, WEIGHT_DECAY)
    client = torch.optim.AdamW(groups, lr=LEARNING_RATE) if cell.optimizer == "client" else None
    return deepspeed.initialize(
        model=model, optimizer=client, model_parameters=None if client else groups, config=config
    )[0]


def train_steps(engine: Any, cell: Cell, steps: Iterable[int], run: Run) -> None:
    """Take these optimizer steps of the contract's training, and note loss and norm of each."""
    rank, rows = dist.get_rank(), rows_of_ranks(cell.world_size)
    own = slice(sum(rows[:rank]), sum(rows[: rank + 1]))
    for step in steps:
        batches, items, tokens = micro_batches(step, cell.accumulation, sum(rows))
        total = torch.zeros((), dtype=torch.float64, device=engine.device)
        for batch in batches:
            batch = {key: value[own].to(engine.device) for key, value in batch.items()}
            engine.train()
            share = engine(
                **batch,
                num_items_in_batch=items,
                num_routed_tokens=tokens,
                gradient_accumulation_steps=cell.accumulation,
            ).loss
            # The engine averages over ranks and micro-steps; the shares already add up to the mean.
            engine.backward(share * cell.world_size, scale_wrt_gas=False)
            engine.step()
            total += share.detach().double()
        dist.all_reduce(total)
        run.losses.append(total.item())
        run.norms.append(float(engine.get_global_grad_norm()))


def run_cell(cell: Cell) -> Run:
    """Train one cell on the ranks of this job."""
    begin, run = time.perf_counter(), Run()
    engine = build_engine(cell)
    torch.manual_seed(100 + dist.get_rank())  # for dropout
    train_steps(engine, cell, range(STEPS), run)
    model = engine.module
    run.state = gather_adapter_state(model)
    run.bytes_sent, run.seconds = model.comm_stats.total_bytes, time.perf_counter() - begin
    engine.destroy()
    gc.collect()
    return run


def run_cells(rank: int, world_size: int, cells: list[Cell]) -> list[Run]:
    """Train every cell of this many ranks, in order; ``rank`` and ``world_size`` are those of the job."""
    return [run_cell(cell) for cell in cells]
