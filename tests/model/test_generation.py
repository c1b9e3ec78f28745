"""``generate`` on the wrapped model: the padding mask reaches the routers, and a KV cache changes nothing."""

import pytest
import torch

from ldmole_ds.layers import ForwardContext
from ldmole_ds.model import adapted_forward
from tests.tiny import tiny_config, tiny_llama, tiny_model, wake_experts

OPTIONS = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
PROMPTS = [[5, 9, 77], [3, 14, 15, 92, 65, 35, 8], [42]]


@pytest.fixture(scope="module")
def model():
    """The experts are strong enough to change what is generated."""
    model = tiny_model().eval()
    wake_experts(model, std=1.0)
    return model


def left_padded(prompts):
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    return {"input_ids": ids, "attention_mask": mask}


def generated(model, prompts, **options):
    inputs = left_padded(prompts)
    return model.generate(**inputs, **{**OPTIONS, **options})[:, inputs["input_ids"].shape[1] :].tolist()


def test_left_padding_changes_nothing(model):
    expected = [generated(model, [prompt])[0] for prompt in PROMPTS]
    assert generated(model, PROMPTS) == expected
    assert len({tuple(row) for row in expected}) == len(PROMPTS)


def test_a_cache_changes_nothing(model):
    assert generated(model, PROMPTS, use_cache=False) == generated(model, PROMPTS)


WAYS = {
    "beams": {"num_beams": 3, "length_penalty": 0.5},
    "sampling": {"do_sample": True, "temperature": 1.5, "top_k": 0},
    "sampled beams": {"do_sample": True, "temperature": 1.5, "num_beams": 2, "top_k": 0},
}


@pytest.mark.parametrize("way", WAYS)
def test_no_way_to_generate_depends_on_the_cache(model, way):
    results = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        results.append(generated(model, PROMPTS, use_cache=use_cache, **WAYS[way]))
    assert results[0] == results[1] != generated(model, PROMPTS)


def test_beams_in_a_batch_are_those_of_each_prompt_alone(model):
    expected = [generated(model, [prompt], **WAYS["beams"])[0] for prompt in PROMPTS]
    assert generated(model, PROMPTS, **WAYS["beams"]) == expected


def test_sampling_draws_from_the_whole_forward_pass(model):
    """By hand: all tokens through the model's forward for each new one, and the same draws."""
    inputs = left_padded(PROMPTS)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    torch.manual_seed(3)
    for _ in range(OPTIONS["max_new_tokens"]):
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, -1]
        drawn = torch.multinomial((logits / 1.5).softmax(-1), 1)
        ids, mask = torch.cat([ids, drawn], 1), torch.cat([mask, torch.ones_like(drawn)], 1)
    model.reset_routing_summary()
    torch.manual_seed(3)
    assert generated(model, PROMPTS, **WAYS["sampling"]) == ids[:, inputs["input_ids"].shape[1] :].tolist()


def test_the_experts_take_part(model):
    bare = generated(tiny_llama().eval(), PROMPTS)
    assert generated(model, PROMPTS) != bare
    with model.disable_adapter():
        assert generated(model, PROMPTS) == bare


def test_padding_is_not_dispatched_in_any_step(model, monkeypatch):
    group, seen = model.input_groups[0], []
    run = group.dispatcher.run

    def watch(x_TD, probs_TGE, experts, layer):
        if layer == group.name:
            seen.append((probs_TGE.flatten(1) != 0).any(1))
        return run(x_TD, probs_TGE, experts, layer)

    monkeypatch.setattr(group.dispatcher, "run", watch)
    generated(model, PROMPTS)
    # One prefill, then five single tokens per row, all of them real.
    assert [len(rows) for rows in seen] == [21] + [3] * 5
    assert torch.equal(seen[0], left_padded(PROMPTS)["attention_mask"].flatten().bool())
    assert all(rows.all() for rows in seen[1:])


def test_generating_records_nothing(model, monkeypatch):
    contexts = []

    def keep(**kwargs):
        contexts.append(ForwardContext(**kwargs))
        return contexts[-1]

    monkeypatch.setattr(adapted_forward, "ForwardContext", keep)
    generated(model, PROMPTS)
    assert len(contexts) == 6 and not any(context.records for context in contexts)
    assert model.routing_summary() == {}
    assert model._holder.current is None and all(group.results.pending is None for group in model.input_groups)


@pytest.mark.parametrize("router", ["softmax", "topk", "lora", "sparsegen_fixed"])
def test_every_router_generates(router):
    model = tiny_model(tiny_config(router=router)).eval()
    assert len(generated(model, PROMPTS)[0]) == OPTIONS["max_new_tokens"]
