"""``generate`` on partitioned experts: ranks that finish apart wait for each other, and give what one process gives."""

from __future__ import annotations

import pytest
import torch

from ldmole_ds.model import LDMoLEModel, ldmole_param_groups
from tests.distributed_utils import run_distributed
from tests.tiny import ragged_batch, tiny_llama, tiny_model, wake_experts

# Prompts and lengths of each rank: other numbers of rows, other widths, and rank 0 done long before rank 1.
PROMPTS = [[[5, 9, 77]], [[3, 14, 15, 92, 65, 35, 8], [42, 7], [11, 12, 13, 14]]]
NEW_TOKENS = [3, 7]
WAYS = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 1.5},
    "beams": {"do_sample": False, "num_beams": 2},
    "no cache": {"do_sample": False, "use_cache": False},
}


def left_padded(prompts):
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    return {"input_ids": ids, "attention_mask": mask}


def generated(model, rank: int, *, eos: int | None = None, max_new_tokens: int | None = None, **way) -> list[list[int]]:
    """What the model adds to the prompts of a rank."""
    inputs = left_padded(PROMPTS[rank])
    torch.manual_seed(rank)
    options = {"max_new_tokens": max_new_tokens or NEW_TOKENS[rank], "pad_token_id": 0, "eos_token_id": eos, **way}
    return model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :].tolist()


def train_and_generate(rank: int, world_size: int, folder: str, layouts: list[tuple]) -> list[dict[str, list]]:
    """For each layout one optimizer step of two micro-steps, every way to generate, and the adapter in ``folder``."""
    import deepspeed

    of_layouts = []
    for index, (stage, ep_size, expert_dispatch) in enumerate(layouts):
        model = tiny_model(ep_size=ep_size, expert_dispatch=expert_dispatch)
        wake_experts(model, std=1.0)
        optimizer = torch.optim.AdamW(ldmole_param_groups(model), lr=5e-2)
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 2,
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
        }
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        for micro_step in range(2):
            batch = ragged_batch(rows=3, seed=10 * micro_step + rank)
            engine.backward(engine(**batch, gradient_accumulation_steps=2).loss)
            engine.step()
        engine.eval()
        results = {name: generated(model, rank, **way) for name, way in WAYS.items()}
        # Rank 0's second greedy token ends its sequence; rank 1 may go on.
        results["end token"] = generated(model, rank, eos=results["greedy"][0][1], max_new_tokens=6, do_sample=False)
        model.save_pretrained(f"{folder}/{index}")
        engine.destroy()
        of_layouts.append(results)
    return of_layouts


@pytest.mark.distributed
def test_ranks_that_finish_apart_do_not_wait_forever(tmp_path):
    """Stage, ep_size, dispatch. With weights, those gathered for the micro-steps are not those of the next step."""
    layouts = [(2, 2, "tokens"), (3, 2, "tokens"), (2, 2, "weights"), (3, 1, "tokens")]
    of_ranks = run_distributed(train_and_generate, 2, str(tmp_path), layouts, deepspeed=True, timeout_s=300)
    for index, layout in enumerate(layouts):
        model = LDMoLEModel.from_pretrained(tiny_llama(), tmp_path / str(index))
        for rank, of_layouts in enumerate(of_ranks):
            results = of_layouts[index]
            for name, way in WAYS.items():
                assert results[name] == generated(model, rank, **way), (layout, rank, name)
            end = results["greedy"][0][1]
            expected = generated(model, rank, eos=end, max_new_tokens=6, do_sample=False)
            assert results["end token"] == expected, (layout, rank)
        ended, went_on = (of_layouts[index]["end token"][0] for of_layouts in of_ranks)
        assert len(ended) < len(went_on)


def test_one_process_generates_as_it_did():
    model, seen = tiny_model().eval(), []
    model.base_model.generate = lambda *args, **kwargs: seen.append((args, kwargs))
    model.generate(1, max_new_tokens=2)
    model.generate(synced_gpus=True)
    assert not model.needs_all_ranks
    assert seen == [((1,), {"synced_gpus": None, "max_new_tokens": 2}), ((), {"synced_gpus": True})]
