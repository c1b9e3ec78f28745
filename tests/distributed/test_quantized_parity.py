"""A quantised base under DeepSpeed: every layout trains as one process on plain layers with the dequantised weights."""

import pytest
import torch

from ldmole_ds.distributed.zero import gathered
from ldmole_ds.model import get_ldmole_model
from ldmole_ds.model.adapter_io import gather_adapter_state
from ldmole_ds.model.param_groups import ldmole_param_groups
from ldmole_ds.parity.compare import worst_of, worst_tensor
from tests.distributed_utils import run_distributed
from tests.quantized_models import call_all_frozen_layers, dequantized_llama, quantized_llama
from tests.tiny import ragged_batch, tiny_config, wake_experts

STEPS, LR, CLIP, ROWS_OF_RANK = 4, 1e-3, 0.05, [5, 3]
# (ZeRO stage, ep_size); stage 0 cannot partition experts, and is not run in bfloat16.
LAYOUTS = [(0, 1), (1, 1), (1, 2), (2, 1), (2, 2), (3, 1), (3, 2)]


def wrapped(base, ep_size: int = 1):
    model = get_ldmole_model(base, tiny_config(), 7, ep_size)
    wake_experts(model)
    return model


def inputs(step: int) -> tuple[dict, int, int]:
    """Global batch of a step, its number of label tokens and of routed tokens."""
    batch = ragged_batch(seed=step)
    return batch, int(batch["labels"][:, 1:].ne(-100).sum()), int(batch["attention_mask"].sum())


def one_process(kind: str) -> dict:
    """The dequantised base, without DeepSpeed."""
    model = wrapped(dequantized_llama(kind)).train()
    optimizer = torch.optim.AdamW(ldmole_param_groups(model, 0.01), lr=LR)
    losses = []
    for step in range(STEPS):
        batch, items, tokens = inputs(step)
        loss = model(**batch, num_items_in_batch=items, num_routed_tokens=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], CLIP)
        optimizer.step()
        losses.append(loss.item())
    return {"losses": losses, "state": gather_adapter_state(model)}


def engine_runs(rank: int, world_size: int, kind: str, runs: list[tuple[int, int, bool, bool]]) -> list[dict]:
    """One result per ``(stage, ep_size, bf16, quantised)``."""
    return [_engine_run(rank, world_size, kind, *run) for run in runs]


def _engine_run(rank: int, world_size: int, kind: str, stage: int, ep_size: int, bf16: bool, quantized: bool) -> dict:
    import deepspeed
    import torch.distributed as dist

    compute_dtype = torch.bfloat16 if bf16 else torch.float32
    model = wrapped(quantized_llama(kind, compute_dtype) if quantized else dequantized_llama(kind), ep_size)
    call_all_frozen_layers(model)
    packed = {n: p.detach().clone() for n, p in model.named_parameters() if not p.is_floating_point()}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": CLIP,
        # Stage 3 releases every weight between its uses, also the small ones of this model.
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": bf16},
    }
    optimizer = torch.optim.AdamW(ldmole_param_groups(model, 0.01), lr=LR)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    own = slice(sum(ROWS_OF_RANK[:rank]), sum(ROWS_OF_RANK[: rank + 1]))
    losses = []
    for step in range(STEPS):
        batch, items, tokens = inputs(step)
        batch = {key: value[own] for key, value in batch.items()}
        if step == 1:
            engine.eval()
            with torch.no_grad():
                engine(**batch)
        engine.train()
        share = engine(**batch, num_items_in_batch=items, num_routed_tokens=tokens).loss
        engine.backward(share * world_size)
        engine.step()
        total = share.detach().float()
        dist.all_reduce(total)
        losses.append(total.item())
    return {
        "losses": losses,
        "state": gather_adapter_state(model),
        "packed_layers": len(packed),
        "base_unchanged": all(_whole_equals(p, packed[n]) for n, p in model.named_parameters() if n in packed),
    }


def _whole_equals(param: torch.Tensor, value: torch.Tensor) -> bool:
    with gathered([param]):
        return torch.equal(param, value)


def assert_same_training(result: dict, expected: dict, tolerance: float, name: str) -> None:
    loss = worst_of(result["losses"], expected["losses"])
    weights = worst_tensor(result["state"], expected["state"])
    assert max(loss, weights) < tolerance, f"{name}: losses differ by {loss:.1e}, weights by {weights:.1e}"


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_float32(kind):
    expected = one_process(kind)
    runs = [(*layout, False, True) for layout in LAYOUTS]
    for results in run_distributed(engine_runs, 2, kind, runs, deepspeed=True, timeout_s=240):
        for run, result in zip(runs, results, strict=True):
            assert_same_training(result, expected, 1e-5, f"{kind}, stage and ep_size {run[:2]}")
            assert result["packed_layers"] == 14 and result["base_unchanged"]


@pytest.mark.distributed
@pytest.mark.parametrize(("kind", "tolerance"), [("nf4", 1e-6), ("int8", 2e-2)])
def test_bfloat16_engine(kind, tolerance):
    """Against the dequantised base in the same layout: a 4-bit layer rounds its weights as the engine's cast does.

    An int8 layer multiplies by its scale in another order, so that some weights round the other way, by 2^-8.
    """
    runs = [(*layout, True, quantized) for layout in LAYOUTS[1:] for quantized in (True, False)]
    for results in run_distributed(engine_runs, 2, kind, runs, deepspeed=True, timeout_s=300):
        for run, result, expected in zip(runs[::2], results[::2], results[1::2], strict=True):
            assert_same_training(result, expected, tolerance, f"{kind}, stage and ep_size {run[:2]}")
            assert result["packed_layers"] == 14 and result["base_unchanged"]
