"""Expert parallelism: who holds which experts, the collectives between them, and the token dispatchers."""

from ldmole_ds.distributed.all_to_all import Channel, CommStats, PeerError, all_to_all
from ldmole_ds.distributed.build import build_dispatcher
from ldmole_ds.distributed.dispatch import (
    AllToAllTokenDispatcher,
    ExpertWeights,
    LocalTokenDispatcher,
    ReferenceTokenDispatcher,
)
from ldmole_ds.distributed.topology import ExpertParallel, expert_parallel
from ldmole_ds.distributed.weight_dispatch import WeightGatherDispatcher

__all__ = [
    "AllToAllTokenDispatcher",
    "Channel",
    "CommStats",
    "ExpertParallel",
    "ExpertWeights",
    "LocalTokenDispatcher",
    "PeerError",
    "ReferenceTokenDispatcher",
    "WeightGatherDispatcher",
    "all_to_all",
    "build_dispatcher",
    "expert_parallel",
]
