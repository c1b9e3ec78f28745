"""Half precision over ranks: an overflow anywhere skips the step everywhere; float32 adapters on a bf16 base."""

from __future__ import annotations

import pytest
import torch

from ldmole_ds.model import get_ldmole_model
from ldmole_ds.model.adapter_io import gather_adapter_state
from ldmole_ds.model.param_groups import ldmole_param_groups
from tests.distributed_utils import engine_computes_in, run_distributed
from tests.tiny import ragged_batch, tiny_config, tiny_llama, tiny_model, wake_experts

pytestmark = pytest.mark.distributed
STAGES, SCALE, ROWS, LR = (1, 2, 3), 2.0**8, (5, 3), 1e-2
FP16 = {"enabled": True, "loss_scale": 0, "initial_scale_power": 8, "hysteresis": 1, "loss_scale_window": 1000}


def make_engine(model, stage, **config):
    import deepspeed

    optimizer = torch.optim.AdamW(ldmole_param_groups(model), lr=LR)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        **config,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    engine.train()
    return engine


def train_step(engine, rank, seed):
    """This rank's share of the loss of one step."""
    batch = ragged_batch(seed=seed)
    counts = {
        "num_items_in_batch": int(batch["labels"][:, 1:].ne(-100).sum()),
        "num_routed_tokens": int(batch["attention_mask"].sum()),
    }
    own = slice(sum(ROWS[:rank]), sum(ROWS[: rank + 1]))
    loss = engine(**{key: value[own] for key, value in batch.items()}, **counts).loss
    engine.backward(loss * len(ROWS))
    engine.step()
    return loss.item()


def overflow_in_one_expert(rank, world_size):
    """Per stage, what each rank saw after a good step, one with an overflow on rank 1 alone, and another good one."""
    found = {}
    for stage in STAGES:
        model = tiny_model(tiny_config(), ep_size=2)
        engine, seen = make_engine(model, stage, fp16=FP16), []
        for step in range(3):
            handle = None
            if step == 1 and rank == 1:
                # Of one projection's experts 4 to 7, in layer 1: no other rank holds them, or computes this gradient.
                handle = model.input_groups[4].lora_B[1].register_hook(lambda grad: grad * torch.inf)
            loss = train_step(engine, rank, seed=step)
            if handle is not None:
                handle.remove()
            scale = float(engine.optimizer.loss_scale)
            state = {k: v.float() for k, v in gather_adapter_state(model).items()}
            seen.append({"loss": loss, "skipped": engine.skipped_steps, "scale": scale, "state": state})
        assert {p.dtype for p in model.parameters()} == {torch.float16}
        found[stage] = seen
        engine.destroy()
    return found


def float32_adapters(rank, world_size):
    """Per stage and for one dense process: losses, weights and dtypes of two steps on a base in bf16."""

    def make(ep_size):
        model = get_ldmole_model(tiny_llama().bfloat16(), tiny_config(adapter_dtype="float32"), 7, ep_size)
        wake_experts(model)
        return model

    found = {}
    for stage in (2, 3):
        model = make(2)
        engine = make_engine(model, stage)
        losses = [train_step(engine, rank, seed=step) for step in range(2)]
        dtypes = {str(p.dtype): p.requires_grad for p in model.parameters()}
        found[stage] = {"losses": losses, "state": gather_adapter_state(model), "dtypes": dtypes}
        engine.destroy()
    return found


def both(rank, world_size):
    overflow = overflow_in_one_expert(rank, world_size) if engine_computes_in("fp16") else None
    return overflow, float32_adapters(rank, world_size)


@pytest.fixture(scope="module")
def per_rank():
    return run_distributed(both, 2, deepspeed=True, timeout_s=600)


def distance(one, other):
    return max((one[key] - other[key]).norm().item() for key in other)


@pytest.mark.parametrize("stage", STAGES)
def test_an_overflow_in_one_expert_skips_the_step_on_all_ranks(per_rank, stage):
    if per_rank[0][0] is None:
        pytest.skip("DeepSpeed does not compute in float16 on this device")
    ranks = [overflow[stage] for overflow, _ in per_rank]
    assert [[step["skipped"] for step in seen] for seen in ranks] == [[0, 1, 1]] * 2
    assert [[step["scale"] for step in seen] for seen in ranks] == [[SCALE, SCALE / 2, SCALE / 2]] * 2
    first, skipped, last = (step["state"] for step in ranks[0])
    assert distance(skipped, first) == 0, "no weight may change, of no expert and of nothing shared"
    # Training goes on, on both ranks and for the very experts that overflowed.
    assert all(torch.isfinite(value).all() for value in last.values())
    name = "model.layers.1.self_attn.k_proj.lora_B"
    moved = (last[name] - skipped[name]).norm(dim=(1, 2))
    assert moved.min() > 0 and distance(ranks[1][2]["state"], last) == 0


@pytest.mark.parametrize("stage", [2, 3])
def test_float32_adapters_on_a_bf16_base_run_in_an_fp32_engine(per_rank, stage):
    found = [mixed[stage] for _, mixed in per_rank]
    assert found[0]["dtypes"] == {"torch.bfloat16": False, "torch.float32": True}
    # The dense form in one process; the base's own rounding differs with the shape of the batch.
    model = get_ldmole_model(tiny_llama().bfloat16(), tiny_config(adapter_dtype="float32"), 7)
    wake_experts(model)
    optimizer, start = torch.optim.AdamW(ldmole_param_groups(model), lr=LR), gather_adapter_state(model)
    for step in range(2):
        batch = ragged_batch(seed=step)
        loss = model.train()(**batch).loss
        assert sum(f["losses"][step] for f in found) == pytest.approx(loss.item(), rel=1e-2)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad()
    expected = gather_adapter_state(model)
    for key, value in expected.items():
        assert found[0]["state"][key].dtype == torch.float32
        assert (found[0]["state"][key] - value).norm() < 0.1 * (value - start[key]).norm(), key
