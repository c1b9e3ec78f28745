"""Attaching experts to a base that ``zero.Init`` has partitioned: no collective, no memory for the base."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from ldmole_ds.distributed import expert_parallel
from ldmole_ds.distributed.zero import gathered, is_zero3_parameter, partitioned_init
from ldmole_ds.model import get_ldmole_model, ldmole_param_groups
from ldmole_ds.model.adapter_io import read_state
from ldmole_ds.parity.model import copy_weights
from tests.distributed_utils import run_distributed
from tests.tiny import ragged_batch, tiny_config, tiny_llama, wake_experts

CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_allow_untested_optimizer": True,
}


class Watch(TorchDispatchMode):
    """Names of the collectives, and bytes of all results that are not on the meta device: freed or not, so at least
    the peak."""

    def __init__(self) -> None:
        super().__init__()
        self.collectives: list[str] = []
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        if func.namespace == "c10d":
            self.collectives.append(func.__name__)
        else:
            tensors = [t for t in tree_leaves(results) if isinstance(t, torch.Tensor) and not t.is_meta]
            self.bytes += sum(t.numel() * t.element_size() for t in tensors)
        return results


def wide_llama() -> LlamaForCausalLM:
    """8 MB, most of it in the embedding, the head and the MLP."""
    sizes = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=6144))


def attach(rank: int, world_size: int) -> dict:
    with partitioned_init(CONFIG):
        base = wide_llama()
    params = list(base.parameters())
    with Watch() as control, gathered(params[:1]):
        pass
    config = tiny_config(num_experts=2, r=1, lambda_hidden_size=4)
    expert_parallel(world_size)  # groups are made with collectives of their own
    with Watch() as watch:
        model = get_ldmole_model(base, config, ep_size=world_size)
    return {
        "control": (control.collectives, control.bytes),
        "collectives": watch.collectives,
        "bytes": watch.bytes,
        "base_bytes": sum(4 * p.ds_numel for p in params),
        "statuses": {p.ds_status.name for p in params},
        "held": sum(p.numel() for p in params),
        "groups": len(model.input_groups),
        "whole": not any(is_zero3_parameter(p) for p in model.input_groups.parameters()),
    }


@pytest.mark.distributed
def test_nothing_of_the_base_is_gathered():
    for found in run_distributed(attach, 2, deepspeed=True):
        collectives, control_bytes = found["control"]
        assert collectives and control_bytes >= 4 * 6144 * 128  # the watch sees a gathered embedding
        assert found["collectives"] == []
        assert found["base_bytes"] > 7e6 and found["bytes"] < 0.05 * found["base_bytes"], found["bytes"]
        assert found["statuses"] == {"NOT_AVAILABLE"} and found["held"] == 0
        assert found["groups"] == 8 and found["whole"]


def train_one_step(rank: int, world_size: int, folder: str) -> list[float]:
    """Experts attached after ``zero.Init``, and within its context. Returns the gradient norms."""
    import deepspeed

    norms, whole = [], tiny_llama()
    for name in ("after", "within"):
        with partitioned_init(CONFIG):
            base = tiny_llama()
            copy_weights(whole, base)
            if name == "within":
                model = get_ldmole_model(base, tiny_config(), 7, world_size)
        if name == "after":
            model = get_ldmole_model(base, tiny_config(), 7, world_size)
        wake_experts(model)
        optimizer = torch.optim.AdamW(ldmole_param_groups(model), lr=1e-2)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=CONFIG)
        engine.backward(engine(**ragged_batch(rows=3, seed=rank)).loss)
        engine.step()
        norms.append(float(engine.get_global_grad_norm()))
        model.save_pretrained(f"{folder}/{name}")
        engine.destroy()
    return norms


@pytest.mark.distributed
def test_attaching_within_the_context_is_attaching_after_it(tmp_path):
    for after, within in run_distributed(train_one_step, 2, str(tmp_path), deepspeed=True):
        assert within == after > 0
    after, within = (read_state(tmp_path / name / "adapter_model.safetensors") for name in ("after", "within"))
    assert after.keys() == within.keys()
    assert all(torch.equal(within[key], value) for key, value in after.items())
