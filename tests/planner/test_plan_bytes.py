"""Calls and bytes by phase are exactly those that a real pass counts, given the rows that it dispatched."""

import pytest
import torch

from ldmole_ds.distributed import AllToAllTokenDispatcher
from ldmole_ds.model import get_ldmole_model
from ldmole_ds.planner import Batch, Layout, shape_of
from ldmole_ds.planner.communication import expert_phases
from tests.distributed_utils import run_distributed
from tests.tiny import tiny_config, tiny_llama, wake_experts

ROWS, LENGTH = 3, 8
CASES = [
    (Layout(2, 2, "tokens"), 1),
    (Layout(2, 2, "tokens", checkpointing=True), 1),
    (Layout(2, 2, "tokens", chunk_tokens=7), 1),
    (Layout(2, 2, "tokens", checkpointing=True, chunk_tokens=7), 1),
    (Layout(2, 2, "weights"), 1),
    (Layout(2, 2, "weights", checkpointing=True), 1),
    (Layout(2, 2, "weights"), 3),
]


def count(rank: int, world_size: int) -> list[dict]:
    """Counted calls and bytes, and rows of each group, for every case."""
    results, plan = [], AllToAllTokenDispatcher.plan
    for layout, accumulation in CASES:
        model = get_ldmole_model(
            tiny_llama(), tiny_config(), 0, 2, layout.dispatch, dispatch_chunk_tokens=layout.chunk_tokens
        )
        wake_experts(model)
        if layout.checkpointing:
            model.gradient_checkpointing_enable()
        rows = {group.name: [0, 0] for group in model.input_groups}

        def watched(self, probs, channel, *rest, rows=rows):
            found = plan(self, probs, channel, *rest)
            rows[channel.layer][0] += sum(found.input_splits)
            rows[channel.layer][1] += sum(found.output_splits)
            return found

        AllToAllTokenDispatcher.plan = watched
        ids = torch.randint(0, 128, (ROWS, LENGTH), generator=torch.Generator().manual_seed(rank))
        for step in range(2):  # the first gathers into nothing
            model.comm_stats.reset()
            for group_rows in rows.values():
                group_rows[:] = [0, 0]
            for _ in range(accumulation):
                options = {"use_cache": False, "gradient_accumulation_steps": accumulation}
                model.train()(input_ids=ids, labels=ids, **options).loss.backward()
            with torch.no_grad():  # an optimizer step
                for param in model.input_groups[0].expert_parameters():
                    param.mul_(1.0 + 1e-3 * (step + 1))
        AllToAllTokenDispatcher.plan = plan
        stats = model.comm_stats
        results.append(
            {
                "counted": {name: (stats.calls[name], stats.bytes[name]) for name in stats.calls},
                "rows": [tuple(rows[group.name]) for group in model.input_groups],
            }
        )
    return results


@pytest.mark.distributed
def test_phases_are_those_of_a_real_pass():
    shape, ranks = shape_of(tiny_llama(), tiny_config()), run_distributed(count, 2)
    for results in ranks:
        for (layout, accumulation), result in zip(CASES, results, strict=True):
            passes = accumulation * (2 if layout.checkpointing else 1)
            rows = [(sent / passes, received / passes) for sent, received in result["rows"]]
            planned = expert_phases(shape, layout, Batch(ROWS, LENGTH, accumulation), 4, rows)
            assert {name: (p.calls, p.bytes) for name, p in planned.items()} == result["counted"], layout
    assert ranks[0][0]["counted"]["dispatch"][1] > 0
