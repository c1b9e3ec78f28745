"""Where the layers start from: a seed and names alone, and lambda MLPs that are shared or are not."""

import itertools

import pytest
import torch

from ldmole_ds.distributed import ExpertParallel
from ldmole_ds.distributed.deepspeed_groups import is_expert_parameter
from ldmole_ds.layers import ForwardContext, LambdaMLP
from ldmole_ds.layers.input_group import seeded_generator
from ldmole_ds.model import get_ldmole_model
from tests.layers.small_group import E, make_group
from tests.tiny import tiny_config, tiny_llama


@pytest.mark.parametrize("ep_size", [2, 4])
def test_the_start_of_an_expert_does_not_depend_on_the_layout(ep_size):
    whole = make_group(awake=False)
    parts = [make_group(topology=ExpertParallel(ep_size, rank), awake=False) for rank in range(ep_size)]
    assert torch.equal(torch.cat([part.lora_A for part in parts], dim=1), whole.lora_A)
    for part in parts:
        assert part.lora_A.shape[1] == E // ep_size and part.partitioned
        assert torch.equal(part.gate, whole.gate), "the router is whole on every rank"
        assert all(map(is_expert_parameter, part.expert_parameters())) and not is_expert_parameter(part.gate)
    assert not any(map(is_expert_parameter, whole.parameters()))


def test_an_expert_depends_on_seed_projection_and_index_and_on_nothing_else():
    whole = make_group(awake=False)
    assert torch.equal(make_group(awake=False).lora_A, whole.lora_A)
    # Of eight experts the first four are the four of a smaller layer; other members change nothing either.
    assert torch.equal(make_group(num_experts=8, awake=False).lora_A[:, :E], whole.lora_A)
    assert torch.equal(make_group(("k",), awake=False).lora_A[0], whole.lora_A[1])
    experts = [*whole.lora_A.flatten(0, 1), *make_group(seed=4, awake=False).lora_A.flatten(0, 1)]
    for one, other in itertools.combinations(experts, 2):
        assert not torch.equal(one, other)


def test_the_start_leaves_the_base_model_as_it_is():
    group = make_group(awake=False)
    assert not any(b.any() for b in group.lora_B)
    bound = 1 / group.in_features**0.5
    assert group.lora_A.abs().max() <= bound and group.gate.abs().max() <= bound
    assert group.lora_A.std() > bound / 3


def test_an_uneven_split_keeps_all_experts():
    group = make_group(topology=ExpertParallel(3, 1), awake=False)
    assert not group.partitioned and group.lora_A.shape[1] == E


def test_seeded_generator_tells_names_apart():
    draws = [torch.rand(1, generator=seeded_generator(*names)).item() for names in ((0, "a"), (1, "a"), (0, "b"))]
    assert len(set(draws)) == 3
    assert torch.rand(1, generator=seeded_generator(0, "a")).item() == draws[0]


def lambda_storages(sharing):
    model = get_ldmole_model(tiny_llama(), tiny_config(lambda_sharing=sharing))
    storages = {}
    for group in model.input_groups:
        storages.setdefault(group.in_features, []).append(group.lambda_mlp.weight_in.data_ptr())
    names = [name for name, _ in model.named_parameters() if "bias_in" in name]
    return storages, names


def test_shared_lambda_mlps_are_one_storage_per_width():
    storages, names = lambda_storages("shared")
    # Two layers of the tiny Llama: q/k/v, o and gate/up read width 64, down reads 96.
    assert {width: len(found) for width, found in storages.items()} == {64: 6, 96: 2}
    assert {width: len(set(found)) for width, found in storages.items()} == {64: 1, 96: 1}
    assert names == ["lambda_mlps.64.bias_in", "lambda_mlps.96.bias_in"]


def test_lambda_mlps_per_layer_are_all_different():
    storages, names = lambda_storages("per_layer")
    assert {width: len(set(found)) for width, found in storages.items()} == {64: 6, 96: 2}
    assert len(names) == 8 and all(name.startswith("input_groups.") for name in names)


def test_lambda_starts_alive_or_as_the_authors_do():
    x = torch.randn(500, 16)
    live, paper = LambdaMLP(16, 32), LambdaMLP(16, 32, init="paper")
    lam, units = live(x)
    assert units.all() and lam.std() > 0.01 and lam.max() < 1
    # Before the bias of -2.5 a hidden unit has a spread of 0.6: hardly any fires, and lambda is nearly constant.
    lam, units = paper(x)
    assert units.float().mean() < 0.2 and lam.std() < 0.01
    # logsigmoid(-2.5) + 0.99 = -log(1 + e^2.5) + 0.99
    torch.testing.assert_close(lam.median(), -torch.log1p(torch.tensor(2.5).exp()) + 0.99)


@pytest.mark.parametrize(
    ("mask_shape", "x_shape", "rows"),
    [
        ((2, 5), (2, 5, 4), [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
        ((2, 5), (2, 1, 4), [4, 9]),  # decoding with a cache: the last column of each row
        ((2, 5), (10, 4), [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
        ((2, 5), (2, 1, 5, 4), [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),  # latent attention (DeepSeek): one head
        ((2, 5), (2, 5, 1, 4), [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
        ((2, 5), (2, 1, 1, 4), [4, 9]),
        ((2, 5), (2, 3, 5, 4), None),
        ((2, 5), (3, 5, 4), None),
        ((2, 5), (2, 6, 4), None),
        ((2, 5), (4, 4), None),
        (None, (2, 5, 4), None),
    ],
)
def test_which_part_of_the_padding_mask_describes_an_input(mask_shape, x_shape, rows):
    # The first token of each row is padding, and so is token 9.
    mask = None if mask_shape is None else torch.arange(10).view(mask_shape) % 5 != 0
    if mask is not None:
        mask[-1, -1] = False
    found = ForwardContext(padding_mask=mask).token_mask(torch.zeros(x_shape))
    assert (found is None) == (rows is None)
    if rows is not None:
        assert found.tolist() == [row not in (0, 5, 9) for row in rows]
