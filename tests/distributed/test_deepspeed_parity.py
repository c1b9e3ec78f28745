"""The contract: the layout never changes the training.

Every layout trains five AdamW steps on one global batch, split unevenly over ranks, with clipping active, all auxiliary
losses on, a shared lambda MLP, awake experts and one idle expert. Loss, gradient norm and weights must be those of a
single dense process that computes every expert by einsum and uses no DeepSpeed.
"""

from __future__ import annotations

import pytest
import torch

from ldmole_ds.model.adapter_io import gather_adapter_state
from ldmole_ds.model.param_groups import ldmole_param_groups
from tests.distributed_utils import run_distributed
from tests.families import DenseDispatcher
from tests.tiny import ragged_batch, tiny_config, tiny_model

STEPS, LR, CLIP, WEIGHT_DECAY, TOLERANCE = 5, 1e-3, 0.05, 0.01, 1e-5
ROWS_OF_RANK = {1: [8], 2: [5, 3], 4: [3, 1, 2, 2]}


def _inputs(step: int) -> tuple[dict, int, int]:
    """Global batch of a step, its number of label tokens (the first column is never one) and of routed tokens."""
    batch = ragged_batch(seed=step)
    return batch, int(batch["labels"][:, 1:].ne(-100).sum()), int(batch["attention_mask"].sum())


def dense_run() -> dict:
    model = tiny_model(tiny_config())
    for group in model.input_groups:
        group.dispatcher = DenseDispatcher()
    optimizer = torch.optim.AdamW(ldmole_param_groups(model, WEIGHT_DECAY), lr=LR)
    start = gather_adapter_state(model)
    losses, norms, model = [], [], model.train()
    for step in range(STEPS):
        batch, items, tokens = _inputs(step)
        loss = model(**batch, num_items_in_batch=items, num_routed_tokens=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        parameters = [p for p in model.parameters() if p.requires_grad]
        norms.append(torch.nn.utils.clip_grad_norm_(parameters, CLIP).item())
        optimizer.step()
        losses.append(loss.item())
    idle = model.routing_summary()["model.layers.0.self_attn.q_proj"]["load"][3]
    return {"losses": losses, "norms": norms, "state": gather_adapter_state(model), "start": start, "idle_load": idle}


def deepspeed_run(rank: int, world_size: int, layouts: list[tuple]) -> list[dict]:
    """One result per ``(ep_size, stage, expert_dispatch)``, or with ``True`` at the end under recomputation."""
    return [_deepspeed_layout(rank, world_size, *layout) for layout in layouts]


def _deepspeed_layout(
    rank: int, world_size: int, ep_size: int, stage: int, expert_dispatch: str, recompute: bool = False
) -> dict:
    import deepspeed
    import torch.distributed as dist

    from ldmole_ds.distributed.deepspeed_groups import moe_marker

    model = tiny_model(tiny_config(), ep_size=ep_size, expert_dispatch=expert_dispatch)
    if recompute:
        model.gradient_checkpointing_enable()
    if ep_size > 1 and stage in (1, 2):
        model.add_module("marker", moe_marker(8, ep_size))
    optimizer = torch.optim.AdamW(ldmole_param_groups(model, WEIGHT_DECAY), lr=LR)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": CLIP,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    rows = ROWS_OF_RANK[world_size]
    own = slice(sum(rows[:rank]), sum(rows[: rank + 1]))
    losses, norms = [], []
    for step in range(STEPS):
        batch, items, tokens = _inputs(step)
        batch = {key: value[own] for key, value in batch.items()}
        engine.train()
        share = engine(**batch, num_items_in_batch=items, num_routed_tokens=tokens).loss
        engine.backward(share * world_size)
        engine.step()
        total = share.detach().clone()
        dist.all_reduce(total)
        losses.append(total.item())
        norms.append(float(engine.get_global_grad_norm()))
    state, num_bytes = gather_adapter_state(model), model.comm_stats.total_bytes
    return {"losses": losses, "norms": norms, "state": state, "bytes": num_bytes}


def relative(value: torch.Tensor, expected: torch.Tensor) -> float:
    return ((value - expected).norm() / expected.norm().clamp(min=1e-12)).item()


def assert_same_training(result: dict, dense: dict, name: str) -> None:
    for key in ("losses", "norms"):
        worst = max(abs(a - b) / abs(b) for a, b in zip(result[key], dense[key], strict=True))
        assert worst < TOLERANCE, f"{name}: {key} differ by {worst:.1e}: {result[key]} against {dense[key]}"
    assert result["state"].keys() == dense["state"].keys()
    for key, expected in dense["state"].items():
        difference = relative(result["state"][key], expected)
        assert difference < TOLERANCE, f"{name}: {key} differs by {difference:.1e}"


@pytest.fixture(scope="module")
def dense() -> dict:
    return dense_run()


def test_the_dense_reference_is_worth_comparing_with(dense):
    assert min(dense["norms"]) > 2 * CLIP, "clipping must be active in every step"
    assert dense["idle_load"] == 0.0, "one expert must be idle"
    moved = [relative(dense["state"][k], v) for k, v in dense["start"].items() if v.norm() > 0]
    assert min(moved) > 100 * TOLERANCE, "weights must move far beyond the tolerance"


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("world_size", "layouts"),
    [
        (1, [(1, 2, "tokens")]),
        (2, [(1, 2, "tokens"), (2, 2, "tokens"), (2, 2, "weights"), (2, 1, "tokens"), (2, 2, "tokens", True)]),
        (2, [(1, 3, "tokens"), (2, 3, "tokens"), (2, 3, "tokens", True)]),
        (4, [(4, 2, "tokens"), (2, 2, "tokens"), (2, 3, "tokens")]),
    ],
)
def test_layout_does_not_change_training(dense, world_size, layouts):
    per_rank = run_distributed(deepspeed_run, world_size, layouts, deepspeed=True, timeout_s=240)
    for results in per_rank:
        for layout, result in zip(layouts, results, strict=True):
            assert_same_training(result, dense, f"{world_size} ranks, ep_size, stage, dispatch {layout}")
            assert (result["bytes"] > 0) == (layout[0] > 1)
