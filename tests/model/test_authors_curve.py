"""A whole model in the authors' formulation, loaded into ours: same logits, losses, training curve and final weights.

The two share the base model, the optimizer and the batches, and no code; see `authors_formulation.py`.
"""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from ldmole_ds.model import get_ldmole_model, ldmole_param_groups
from tests.model.authors_formulation import AuthorsModel
from tests.model.authors_keys import authors_state
from tests.tiny import ragged_batch, tiny_config

STEPS, LR, WEIGHT_DECAY, CLIP = 15, 3e-3, 0.1, 0.6
WEIGHTS = {"sparsity": 0.1, "load_balancing": 1.0, "router_z": 0.01}
LAMBDA_STARTS = pytest.mark.parametrize("lambda_init", ["random", "paper"])
FAMILIES = pytest.mark.parametrize("family", ["qwen3", "llama"])


def base_model(family):
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 128,
        "initializer_range": 0.1,
        "attn_implementation": "eager",
    }
    if family == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**sizes, head_dim=16))
    return LlamaForCausalLM(LlamaConfig(**sizes))


@torch.no_grad()
def authors_model(family, lambda_init):
    """Awake experts, and routers so sharp that the number of experts differs by token."""
    torch.manual_seed(1)
    base, sizes = base_model(family), {"num_experts": 8, "r": 4, "alpha": 8, "hidden_size": 16}
    model = AuthorsModel(base, **sizes, target_num_experts=2, weights=WEIGHTS)
    for layer in model.layers:
        layer.lora_route.weight.mul_(4)
        for i in range(layer.num_experts):
            nn.init.normal_(getattr(layer, f"lora_B{i}").weight, std=0.05)
    for mlp in model.layers[0].sparsegen.mlp.proj_layers.values():
        nn.init.constant_(mlp[2].bias, -2.5)
        if lambda_init == "paper":
            nn.init.constant_(mlp[0].bias, -2.5)
        else:
            nn.init.normal_(mlp[0].bias)
            nn.init.normal_(mlp[2].weight, std=0.3)
    return model


def our_model(family, source, *, mask_padding=False):
    """Started from another seed, then loaded."""
    weights = {f"{name}_loss_weight": weight for name, weight in WEIGHTS.items()}
    config = tiny_config(mask_padding=mask_padding, **weights)
    model = get_ldmole_model(base_model(family), config, seed=5)
    model.load_reference_adapter(source.adapter_state())
    return model


def batch_of(step):
    """Three left-padded batches in turn; 42 % of their positions are padding."""
    return ragged_batch(rows=4, width=10, seed=1 + step % 3)


def relative(value, expected):
    return ((value - expected).norm() / expected.norm()).item()


@FAMILIES
@LAMBDA_STARTS
def test_logits(family, lambda_init):
    theirs = authors_model(family, lambda_init).eval()
    ours = our_model(family, theirs).eval()
    batch = batch_of(0)
    with torch.no_grad():
        _, expected, _ = theirs(**batch)
        logits, bare = ours(**batch).logits, base_model(family).eval()(**batch).logits
    largest = expected.abs().max()
    assert (logits - expected).abs().max() < 1e-5 * largest
    # What was compared is not the base model alone, and routing is neither dense nor one expert for all.
    assert (expected - bare).abs().max() > 0.2 * largest
    experts_per_token = torch.stack([(layer.routing[1] > 0).sum(-1) for layer in theirs.layers])
    assert len(experts_per_token.unique()) > 5


def trained(model, param_groups, step_losses):
    """Every step's loss, gradient norm and auxiliary losses: ``(STEPS, 5)``."""
    optimizer = torch.optim.AdamW(param_groups, lr=LR)
    curve = []
    for step in range(STEPS):
        loss, aux = step_losses(model.train(), batch_of(step))
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_([p for group in param_groups for p in group["params"]], CLIP)
        optimizer.step()
        curve.append([loss.item(), norm.item(), *(aux[name].item() for name in sorted(aux))])
    return torch.tensor(curve, dtype=torch.float64)


def train_theirs(model):
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    biases = [p for name, p in named if name.endswith("bias")]
    weights = [p for name, p in named if not name.endswith("bias")]
    groups = [{"params": weights, "weight_decay": WEIGHT_DECAY}, {"params": biases, "weight_decay": 0.0}]

    def step_losses(model, batch):
        loss, _, aux = model(**batch)
        return loss, aux

    return trained(model, groups, step_losses)


def train_ours(model):
    def step_losses(model, batch):
        output = model(**batch)
        return output.loss, output.aux_losses

    return trained(model, ldmole_param_groups(model, WEIGHT_DECAY), step_losses)


@FAMILIES
@LAMBDA_STARTS
def test_curve_and_final_weights(family, lambda_init):
    theirs = authors_model(family, lambda_init)
    ours, start = our_model(family, theirs), theirs.adapter_state()
    expected, curve = train_theirs(theirs), train_ours(ours)
    difference = ((curve - expected) / expected).abs().amax(0)
    assert (difference < 1e-4).all(), f"loss, gradient norm, auxiliary losses differ by {difference.tolist()}"
    loss, norm = expected[:, 0], expected[:, 1]
    assert loss[-3:].mean() < 0.8 * loss[:3].mean(), "the model must have learned"
    assert norm.max() > CLIP, "the gradient must be clipped"

    end, our_end = theirs.adapter_state(), authors_state(ours)
    assert our_end.keys() == end.keys()
    moved = [name for name, value in end.items() if relative(start[name], value) > 1e-3]
    assert len(moved) > 0.8 * len(end)
    for name, value in end.items():
        assert relative(our_end[name], value) < 1e-4, name
    for name in moved:  # and by how far they went
        assert relative(our_end[name] - start[name], end[name] - start[name]) < 1e-3, name


@FAMILIES
def test_padding_counts_in_their_sparsity_and_z_loss_only(family):
    """And the batches hold enough padding for the comparison above to see who counts it."""
    theirs, batch = authors_model(family, "random"), batch_of(2)
    _, _, expected = theirs(**batch)
    masked = our_model(family, theirs, mask_padding=True).train()(**batch).aux_losses
    difference = {name: abs(masked[name].item() / value.item() - 1) for name, value in expected.items()}
    assert difference["load_balancing"] < 1e-5
    assert min(difference["sparsity"], difference["router_z"]) > 3e-3, difference
