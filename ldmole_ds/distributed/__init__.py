"""Expert parallelism: who holds which experts, the collectives between them, and the token dispatchers."""

from ldmole_ds.distributed.all_to_all import CommStats, all_to_all
from ldmole_ds.distributed.dispatch import (
    AllToAllTokenDispatcher,
    ExpertWeights,
    LocalTokenDispatcher,
    ReferenceTokenDispatcher,
    WeightGatherDispatcher,
    build_dispatcher,
)
from ldmole_ds.distributed.topology import ExpertParallel, expert_parallel

__all__ = [
    "AllToAllTokenDispatcher",
    "CommStats",
    "ExpertParallel",
    "ExpertWeights",
    "LocalTokenDispatcher",
    "ReferenceTokenDispatcher",
    "WeightGatherDispatcher",
    "all_to_all",
    "build_dispatcher",
    "expert_parallel",
]
