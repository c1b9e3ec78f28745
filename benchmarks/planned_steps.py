"""The cases of `plan_accuracy.py`: models and layouts, and real DeepSpeed steps of each on the ranks."""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import LlamaConfig

from benchmarks.delayed_link import DelayedLink, join
from ldmole_ds.config import LDMoLEConfig
from ldmole_ds.planner import Batch, Layout
from ldmole_ds.planner.calibrate import measure as measure_machine
from ldmole_ds.planner.calibrate_steps import zero_settings

STEPS, WARM = 5, 1


def _llama(hidden: int, inner: int, layers: int, heads: int, vocabulary: int) -> LlamaConfig:
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "vocab_size": vocabulary}
    return LlamaConfig(**sizes, num_attention_heads=heads, num_key_value_heads=heads // 2)


# Base, adapter, rows and tokens of a micro-step.
MODELS = {
    "small": (_llama(64, 96, 2, 4, 128), LDMoLEConfig(r=4, lambda_hidden_size=16, lora_dropout=0.0), 4, 32),
    "mid": (_llama(384, 1024, 4, 6, 4096), LDMoLEConfig(r=8, lambda_hidden_size=128, lora_dropout=0.0), 4, 64),
    # A large adapter, few tokens: the optimizer takes as long as forward and backward.
    "wide": (_llama(512, 1024, 4, 8, 1024), LDMoLEConfig(r=32, lambda_hidden_size=64, lora_dropout=0.0), 2, 32),
}


@dataclass(frozen=True)
class Case:
    """One layout of one model."""

    model: str
    layout: Layout
    accumulation: int = 1

    def batch(self) -> Batch:
        return Batch(*MODELS[self.model][2:], self.accumulation)

    def __str__(self) -> str:
        marks = [f"ZeRO-{self.layout.zero_stage}", "recompute" * self.layout.checkpointing]
        marks += [f"chunks of {self.layout.chunk_tokens}" * bool(self.layout.chunk_tokens)]
        marks += [f"{self.accumulation} micro-steps" * (self.accumulation > 1)]
        experts = "replicated" if self.layout.ep_size == 1 else f"ep {self.layout.ep_size} {self.layout.dispatch}"
        return ", ".join([self.model, experts, *filter(None, marks)])


def cases(world_size: int) -> list[Case]:
    """What is measured with this many ranks."""
    found = []
    for model in ("small", "mid"):
        found.append(Case(model, Layout()))
        if world_size > 1:
            found += [Case(model, Layout(world_size, 2, mode)) for mode in ("weights", "tokens")]
    if world_size <= 2:
        found.append(Case("wide", Layout()))
    if world_size == 2:
        found += [
            Case("mid", Layout(2, 1, "tokens")),
            Case("mid", Layout(2, 3, "tokens")),
            Case("mid", Layout(2, 2, "tokens", checkpointing=True)),
            Case("mid", Layout(2, 2, "tokens", chunk_tokens=100)),
            Case("mid", Layout(2, 2, "weights"), accumulation=2),
            Case("mid", Layout(2, 2, "weights", checkpointing=True)),
        ]
    if world_size == 4:
        found.append(Case("mid", Layout(2, 2, "tokens")))
    return found


def measure(rank: int, world_size: int, planned: list[Case], link: DelayedLink | None = None) -> dict:
    """Times of the calibration, and what each case did. Collective."""
    if link:
        join(link, rank)
    before = measure_machine(torch.device("cpu"))
    results = [measure_case(case) for case in planned]
    return {"times": before.best(measure_machine(torch.device("cpu"))), "results": results}


def measure_case(case: Case) -> dict:
    """Train a few steps; figures of this rank. Collective."""
    import deepspeed

    from ldmole_ds.distributed.dispatch import AllToAllTokenDispatcher
    from ldmole_ds.model import get_ldmole_model, ldmole_param_groups
    from ldmole_ds.parity.model import wake_experts
    from ldmole_ds.planner.model_shape import build_base
    from ldmole_ds.planner.trace import trace_model

    hf_config, adapter, micro, length = MODELS[case.model]
    layout, batch = case.layout, case.batch()
    torch.manual_seed(0)  # the engine takes rank 0's base: all must route the traced step with it
    base = build_base(hf_config)
    torch.manual_seed(dist.get_rank())
    ids = [torch.randint(0, hf_config.vocab_size, (micro, length)) for _ in range(batch.accumulation)]
    memory_before = _resident()
    model = get_ldmole_model(
        base,
        adapter,
        0,
        layout.ep_size,
        "tokens" if layout.ep_size == 1 else layout.dispatch,
        dispatch_chunk_tokens=layout.chunk_tokens,
    )
    wake_experts(model)
    if layout.checkpointing:
        model.gradient_checkpointing_enable()
    rows: dict[str, list[tuple[int, int]]] = {group.name: [] for group in model.input_groups}
    plan = AllToAllTokenDispatcher.plan

    def watched_plan(self, probs, channel, *rest):
        found = plan(self, probs, channel, *rest)
        rows[channel.layer].append((sum(found.input_splits), sum(found.output_splits)))
        return found

    AllToAllTokenDispatcher.plan = watched_plan
    figures = {
        "peak": trace_model(model, ids[0], batch.accumulation).peak,
        "parameters": model.num_parameters_by_kind(),
    }
    AllToAllTokenDispatcher.plan = plan
    config = {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": batch.accumulation,
        "gradient_clipping": 1.0,
        "zero_optimization": zero_settings(layout.zero_stage, hf_config.hidden_size),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    # A rate of zero: routing stays that of the traced step, while every step does all its work. Gathered experts that
    # did not change would not be gathered again, so these move a little.
    rate = 1e-6 if layout.dispatch == "weights" else 0.0
    optimizer = torch.optim.AdamW(ldmole_param_groups(model), lr=rate)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    times = []
    for _ in range(WARM + STEPS):
        model.comm_stats.reset()
        dist.barrier()
        begin = time.perf_counter()
        for micro_ids in ids:
            mask = torch.ones_like(micro_ids)
            loss = engine(
                input_ids=micro_ids,
                attention_mask=mask,
                labels=micro_ids,
                use_cache=False,
                gradient_accumulation_steps=batch.accumulation,
            ).loss
            engine.backward(loss)
            engine.step()
        slowest = torch.tensor(time.perf_counter() - begin, dtype=torch.float64)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        times.append(slowest.item())
    stats = model.comm_stats
    figures |= {
        "all_seconds": times[WARM:],
        "phases": {name: (stats.calls[name], stats.bytes[name]) for name in stats.calls},
        "rows": [_totals(rows[group.name], layout.checkpointing) for group in model.input_groups],
        "resident": _resident("VmHWM") - memory_before,
    }
    engine.destroy()
    del engine, model, optimizer, loss
    gc.collect()
    return figures


def _totals(found: list[tuple[int, int]], recomputed: bool) -> tuple[float, float]:
    """Rows sent and received in one forward pass: its chunks add up, and recomputation has them twice."""
    passes = 2 if recomputed else 1
    return sum(sent for sent, _ in found) / passes, sum(received for _, received in found) / passes


def _resident(name: str = "VmRSS") -> int:
    """Bytes of this process in memory now, or at most so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
