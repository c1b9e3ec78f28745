"""Real steps of a reference model in DeepSpeed's engine, in a layout: what the planner's costs are derived from."""

from __future__ import annotations

import gc
import time
from typing import Any

import torch
import torch.distributed as dist

from ldmole_ds.distributed.deepspeed_private import skip_shared_memory_op
from ldmole_ds.model import get_ldmole_model, ldmole_param_groups
from ldmole_ds.planner.layout import Layout
from ldmole_ds.planner.reference import Reference
from ldmole_ds.planner.timing import slowest

_WARM, _STEPS = 2, 5
# Gathered experts that did not change would not be gathered again, so they move a little.
_RATE = 1e-6


def zero_settings(stage: int, hidden_size: int) -> dict[str, Any]:
    """``zero_optimization`` as the Trainer completes the settings of ``ds_configs``."""
    found: dict[str, Any] = {"stage": stage, "reduce_bucket_size": hidden_size**2}
    if stage == 3:
        found["stage3_prefetch_bucket_size"] = int(0.9 * hidden_size**2)
        found["stage3_param_persistence_threshold"] = 10 * hidden_size
    return found


def reference_step(reference: Reference, num_experts: int, layout: Layout, device: torch.device) -> dict[str, float]:
    """Train some steps of the reference in this layout. Collective.

    Returns:
        ``seconds`` of the fastest step, each as long as its slowest rank took; ``update``: the same of the engine's own
        step, after forward and backward; ``dispatched``: bytes that a rank sent in the dispatches of a step, their mean
        over the ranks.
    """
    import deepspeed

    skip_shared_memory_op()
    mode = "tokens" if layout.dispatch == "replicate" else layout.dispatch
    model = get_ldmole_model(reference.base(), reference.adapter(num_experts), 0, layout.ep_size, mode).to(device)
    config = {
        "train_micro_batch_size_per_gpu": reference.batch.micro,
        "gradient_clipping": 1.0,
        "zero_optimization": zero_settings(layout.zero_stage, reference.hidden),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    optimizer = torch.optim.AdamW(ldmole_param_groups(model), lr=_RATE)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    ids = reference.ids(dist.get_rank()).to(device)
    mask, times, updates = torch.ones_like(ids), [], []
    for _ in range(_WARM + _STEPS):
        model.comm_stats.reset()
        dist.barrier()
        begin = time.perf_counter()
        loss = engine(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False).loss
        engine.backward(loss)
        loss.item()  # wait for the device
        middle = time.perf_counter()
        engine.step()
        loss.item()
        end = time.perf_counter()
        times.append(slowest(end - begin, device))
        updates.append(slowest(end - middle, device))
    sent = torch.tensor([model.comm_stats.bytes.get("dispatch", 0)], dtype=torch.float64, device=device)
    dist.all_reduce(sent)
    engine.destroy()
    del engine, model, optimizer, loss
    gc.collect()
    dispatched = sent.item() / dist.get_world_size()
    return {"seconds": min(times[_WARM:]), "update": min(updates[_WARM:]), "dispatched": dispatched}
