"""The doctor's measurement of the link, and its check of one exchange, which finds what is computed wrongly."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from ldmole_ds.distributed import expert_exchange
from ldmole_ds.doctor.exchange import ExchangeCheck, check_exchange, exchange_groups
from ldmole_ds.doctor.link import LinkTime, measure_collectives, transport_of
from tests.distributed_utils import CAN_SHARE, run_distributed

CPU = torch.device("cpu")


def look(rank: int, world_size: int) -> tuple[list[LinkTime], list[ExchangeCheck], float]:
    """Times of two sizes, verdicts, and the difference found when results come back to the wrong tokens."""
    if world_size > 1:
        with pytest.raises(ValueError, match="no tokens are exchanged"):
            exchange_groups(1)
    with pytest.raises(ValueError, match="does not divide"):
        exchange_groups(3)
    topology = exchange_groups()
    transport = "shared memory" if world_size > 1 and CAN_SHARE else "gloo"
    assert transport_of(topology, CPU).split(" (")[0] == transport
    link = measure_collectives(topology.collectives, CPU, (1 << 10, 1 << 14))
    checks = check_exchange(topology, CPU)

    class Mixed(expert_exchange.Exchange):
        def wait(self):
            rows = super().wait()
            return rows.flip(0) if self._phase == "combine" else rows

    expert_exchange.Exchange = Mixed
    tokens, weights = check_exchange(topology, CPU)
    assert not tokens.passed and weights.passed
    return link, checks, tokens.difference


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [1, 2])
def test_on_cpu_ranks(world_size):
    results = run_distributed(look, world_size, deepspeed=True)
    for link, checks, difference in results:
        assert [c.dispatch for c in checks] == ["tokens", "weights"]
        assert all(c.passed and c.difference < 1e-5 for c in checks)
        # Counts, dispatch, combine and the twins of the last two: forced also where there is one rank.
        assert [c.calls for c in checks] == [5, 2]
        assert difference > 1e-2
        assert [(t.collective, t.num_bytes) for t in link] == [
            (name, size) for size in (1 << 10, 1 << 14) for name in ("all-to-all", "all-gather", "reduce-scatter")
        ]
        assert all(t.seconds > 0 and (t.bandwidth > 0) == (world_size > 1) for t in link)
    # Everyone reports the slowest.
    assert len({tuple(t.seconds for t in link) for link, *_ in results}) == 1


@pytest.mark.gpu
def test_one_gpu_through_nccl(tmp_path):
    device = torch.device("cuda", 0)
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1, device_id=device)
    try:
        topology = exchange_groups()
        assert all(check.passed for check in check_exchange(topology, device))
        assert all(time.seconds > 0 for time in measure_collectives(topology.collectives, device, (1 << 10,)))
    finally:
        dist.destroy_process_group()
