"""One dense process: every expert computed for every token by einsum, no DeepSpeed. What all layouts must equal."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ldmole_ds.distributed import ExpertParallel, LocalTokenDispatcher
from ldmole_ds.model import ldmole_param_groups
from ldmole_ds.model.adapter_io import gather_adapter_state
from ldmole_ds.ops import lora_experts_reference
from ldmole_ds.parity.cells import ROUTERS
from ldmole_ds.parity.model import IDLE_EXPERT, ragged_batch, small_config, small_model

STEPS, LEARNING_RATE, CLIP, WEIGHT_DECAY = 5, 1e-3, 0.05, 0.01
ROWS_PER_MICRO_STEP = 8


@dataclass
class Run:
    """What a training run leaves behind.

    Attributes:
        losses, norms: Of each optimizer step: global loss, gradient norm before clipping.
        state: The adapter at the end, all experts, canonical form.
        start: The adapter at the start (dense run only).
        idle_load: Share of tokens that the expert meant to be idle got (dense run only).
        bytes_sent: By the expert-parallel collectives of this rank.
        seconds: Wall time.
    """

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    state: dict[str, Tensor] = field(default_factory=dict)
    start: dict[str, Tensor] = field(default_factory=dict)
    idle_load: float = 0.0
    bytes_sent: int = 0
    seconds: float = 0.0


class DenseDispatcher(LocalTokenDispatcher):
    """Every expert's output of every token, written out."""

    def run(self, x_TD, probs_TGE, experts, layer):
        return lora_experts_reference(x_TD, probs_TGE, experts.lora_A, experts.lora_B, experts.scaling)


def micro_batches(step: int, accumulation: int, rows: int) -> tuple[list[dict], int, int]:
    """The global micro-batches of a step, and its label tokens (the first column is never one) and routed tokens."""
    batches = [ragged_batch(rows, seed=step * accumulation + m) for m in range(accumulation)]
    items = sum(int(b["labels"][:, 1:].ne(-100).sum()) for b in batches)
    return batches, items, sum(int(b["attention_mask"].sum()) for b in batches)


def dense_run(accumulation: int = 1, router: str = "sparsegen", rows: int = ROWS_PER_MICRO_STEP) -> Run:
    """Train `STEPS` AdamW steps in this process alone, in float32, with one of `cells.ROUTERS`."""
    model = small_model(small_config(**ROUTERS[router]))
    model.topology = ExpertParallel()  # one process, also where a job's communication is up
    for group in model.input_groups:
        group.dispatcher = DenseDispatcher()
    optimizer = torch.optim.AdamW(ldmole_param_groups(model, WEIGHT_DECAY), lr=LEARNING_RATE)
    parameters = [p for p in model.parameters() if p.requires_grad]
    run, model = Run(start=gather_adapter_state(model)), model.train()
    for step in range(STEPS):
        batches, items, tokens = micro_batches(step, accumulation, rows)
        total = 0.0
        for batch in batches:
            counts = {"num_items_in_batch": items, "num_routed_tokens": tokens}
            loss = model(**batch, **counts, gradient_accumulation_steps=accumulation).loss
            loss.backward()
            total += loss.item()
        run.norms.append(torch.nn.utils.clip_grad_norm_(parameters, CLIP).item())
        optimizer.step()
        optimizer.zero_grad()
        run.losses.append(total)
    if router == "sparsegen":
        first = model.input_groups[0].members[0]
        run.idle_load = model.routing_summary()[first]["load"][IDLE_EXPERT]
    run.state = gather_adapter_state(model)
    return run
