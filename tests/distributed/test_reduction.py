"""Over which ranks each kind of parameter is reduced: 4 ranks, ep_size 2.

Ranks 0 and 2 hold experts 0 to 3, ranks 1 and 3 hold experts 4 to 7. Routers, the lambda MLP and ``modules_to_save``
must follow the mean gradient of all four ranks; experts the sum over their two ranks, divided by four: one expert's
tokens come from all ranks, two by two through each holder. One step of plain gradient descent shows it.
"""

from __future__ import annotations

import pytest
import torch

from ldmole_ds.distributed.zero import gathered
from ldmole_ds.model import ldmole_param_groups
from tests.distributed_utils import run_distributed
from tests.tiny import ragged_batch, tiny_config, tiny_model

# The rate is large, so that what a weight moves by is not lost beside the weight.
WORLD_SIZE, EP_SIZE, RATE = 4, 2, 100.0
ALL, EVEN, ODD = (0, 1, 2, 3), (0, 2), (1, 3)
LAYER = "input_groups.0"
# Which rank gets an extra gradient on one parameter of each kind, and the ranks whose weights must then change.
PERTURBED = {
    f"{LAYER}.gate": (2, ALL),
    "lambda_mlps.64.weight_in": (1, ALL),
    "lambda_mlps.96.bias_out": (3, ALL),
    "base_model.lm_head.weight": (3, ALL),
    f"{LAYER}.lora_A": (1, ODD),
    f"{LAYER}.lora_B.2": (2, EVEN),
    "input_groups.5.lora_A": (0, EVEN),
}
EXTRA = 0.01


def is_expert(name: str) -> bool:
    return ".lora_" in name


def one_step(rank: int, stage: int, perturb: bool) -> dict[str, dict[str, torch.Tensor]]:
    """This rank's own gradients and its weights before and after the step, on rows of its own."""
    import deepspeed

    model = tiny_model(tiny_config(modules_to_save=["lm_head"]), ep_size=EP_SIZE)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = {}

    def hook(name):
        def note(gradient):
            gradients[name] = gradient.clone()
            if perturb and PERTURBED.get(name, (None,))[0] == rank:
                return gradient + EXTRA
            return gradient

        return note

    for name, param in trained.items():
        param.register_hook(hook(name))

    def weights():
        with gathered(trained.values()):
            return {name: p.detach().clone() for name, p in trained.items()}

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.SGD(ldmole_param_groups(model), lr=RATE)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    before = weights()
    engine.backward(engine(**ragged_batch(rows=2, seed=rank)).loss)
    engine.step()
    after = weights()
    engine.destroy()
    return {"gradients": gradients, "before": before, "after": after}


def run_stages(rank: int, world_size: int, stages: list[int]) -> dict[int, tuple]:
    return {stage: (one_step(rank, stage, False), one_step(rank, stage, True)) for stage in stages}


@pytest.fixture(scope="module")
def ranks():
    """Per rank and stage, the plain and the perturbed step."""
    return run_distributed(run_stages, WORLD_SIZE, [1, 2, 3], deepspeed=True, timeout_s=400)


def close(value: torch.Tensor, expected: torch.Tensor) -> bool:
    return (value - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.distributed
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_weights_follow_the_gradients_of_the_right_ranks(ranks, stage):
    steps = [per_stage[stage][0] for per_stage in ranks]
    for name, start in steps[0]["before"].items():
        expert = is_expert(name)
        gradients = [step["gradients"][name] for step in steps]
        assert not any(torch.equal(gradients[0], other) for other in gradients[1:]), name
        for rank, step in enumerate(steps):
            group = [r for r in ALL if not expert or r % EP_SIZE == rank % EP_SIZE]
            moved = step["before"][name] - step["after"][name]
            assert close(moved, RATE * sum(gradients[r] for r in group) / WORLD_SIZE), (name, rank)
            for other in ALL:
                same = torch.equal(step["after"][name], steps[other]["after"][name])
                assert same == (other in group), (name, rank, other)
        assert expert or torch.equal(start, steps[1]["before"][name])


@pytest.mark.distributed
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_gradient_on_one_rank_moves_the_weights_of_its_group_only(ranks, stage):
    for rank, per_stage in enumerate(ranks):
        plain, perturbed = (step["after"] for step in per_stage[stage])
        for name, value in plain.items():
            shift = value - perturbed[name]
            if rank in PERTURBED.get(name, (None, ()))[1]:
                expected = torch.full_like(shift, RATE * EXTRA / WORLD_SIZE)
                assert close(shift, expected), (name, rank)
            else:
                assert torch.equal(value, perturbed[name]), (name, rank)
