"""From the setting ``expert_dispatch`` to a dispatcher."""

from __future__ import annotations

from ldmole_ds.distributed.all_to_all import CommStats
from ldmole_ds.distributed.dispatch import AllToAllTokenDispatcher, LocalTokenDispatcher
from ldmole_ds.distributed.topology import ExpertParallel
from ldmole_ds.distributed.weight_dispatch import WeightGatherDispatcher


def build_dispatcher(
    topology: ExpertParallel, num_experts: int, mode: str, stats: CommStats, chunk_tokens: int = 0
) -> LocalTokenDispatcher:
    """The dispatcher of a layer with ``num_experts`` experts under this layout.

    Args:
        topology: Who holds which experts.
        num_experts: E of the layer; where ep_size does not divide it, all experts are local.
        mode: tokens or weights.
        stats: Counts what is moved.
        chunk_tokens: See `AllToAllTokenDispatcher`; weights ignores it, since it holds no token of another rank.
    """
    if mode not in ("tokens", "weights"):
        raise ValueError(f"expert_dispatch={mode!r} is not known: use one of tokens, weights, auto")
    if not topology.partitions(num_experts):
        return LocalTokenDispatcher(stats)
    if mode == "weights":
        return WeightGatherDispatcher(topology, stats)
    return AllToAllTokenDispatcher(topology, stats, chunk_tokens)
