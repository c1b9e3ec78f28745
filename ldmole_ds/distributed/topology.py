"""Which rank holds which experts.

W ranks, ``ep_size`` P. An expert-parallel (EP) group is P consecutive ranks that together hold every expert once,
each E/P of them; they exchange tokens. An expert-data-parallel (EDP) group is the W/P ranks that hold the same
experts; they average those experts' gradients. With W = 4 and P = 2:

    rank            0      1      2      3
    experts       0..3   4..7   0..3   4..7
    EP groups     [0      1]    [2      3]
    EDP groups    [0             2],  [1             3]

The names and groups are DeepSpeed's (``ep_size_<P>``) where DeepSpeed's communication is up, so that its ZeRO stages
reduce expert gradients over the right ranks; with plain ``torch.distributed`` the same groups are made here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist

from ldmole_ds.distributed import deepspeed_groups, deepspeed_private
from ldmole_ds.distributed.all_to_all import Channel, CommStats
from ldmole_ds.distributed.collectives import Collectives
from ldmole_ds.distributed.deepspeed_engine import prepare_engines
from ldmole_ds.distributed.mailboxes import Mailboxes
from ldmole_ds.distributed.shared_memory import open_mailboxes


@dataclass(frozen=True)
class ExpertParallel:
    """This rank's place in the expert-parallel layout. ``ep_size == 1`` needs no process group.

    Attributes:
        ep_size: Ranks that share one copy of all experts.
        ep_rank: This rank's index in its EP group; it holds global experts ``[ep_rank * E/P, (ep_rank + 1) * E/P)``.
        ep_group: Process group for dispatch and combine, None when ``ep_size == 1``.
        edp_group: Process group of the ranks with the same experts, None when ``ep_size == 1``.
        world_size: All ranks; every one is a data-parallel rank.
        rank: This rank's global index.
        mailboxes: Of the EP group, where its ranks share memory (`ldmole_ds.distributed.shared_memory`).
    """

    ep_size: int = 1
    ep_rank: int = 0
    ep_group: dist.ProcessGroup | None = None
    edp_group: dist.ProcessGroup | None = None
    world_size: int = 1
    rank: int = 0
    mailboxes: Mailboxes | None = None

    @property
    def group_name(self) -> str:
        """DeepSpeed's key for this pair of groups."""
        return f"ep_size_{self.ep_size}"

    def local_experts(self, num_experts: int) -> range:
        """Global indices of the experts held here; all of them where ``ep_size`` does not divide ``num_experts``."""
        if not self.partitions(num_experts):
            return range(num_experts)
        per_rank = num_experts // self.ep_size
        return range(self.ep_rank * per_rank, (self.ep_rank + 1) * per_rank)

    def partitions(self, num_experts: int) -> bool:
        """Whether a layer with this many experts is spread over the EP group (else it is replicated)."""
        return self.ep_size > 1 and num_experts % self.ep_size == 0

    @property
    def collectives(self) -> Collectives:
        """How the ranks of the EP group reach each other."""
        assert self.ep_group is not None, "a rank that holds all experts exchanges nothing"
        return Collectives(self.ep_group, self.mailboxes)

    def channel(self, stats: CommStats, layer: str) -> Channel:
        """The way of a layer's collectives."""
        return Channel(self.collectives.group, stats, layer, self.mailboxes)


def expert_parallel(ep_size: int = 1) -> ExpertParallel:
    """Make (or reuse) the EP and EDP groups. Collective: every rank of the world calls it with the same value.

    Raises:
        ValueError: ``ep_size`` is not positive, or does not divide the number of ranks.
        RuntimeError: ``ep_size > 1`` without an initialised process group.
    """
    if not isinstance(ep_size, int) or ep_size < 1:
        raise ValueError(f"ep_size must be a whole number of at least 1, got {ep_size!r}")
    initialised = dist.is_available() and dist.is_initialized()
    if not initialised:
        if ep_size > 1:
            raise RuntimeError(
                f"ep_size={ep_size} needs an initialised process group: start with `deepspeed --num_gpus N` or "
                "`torchrun`, and call deepspeed.init_distributed() first; or use ep_size=1"
            )
        return ExpertParallel()
    world_size, rank = dist.get_world_size(), dist.get_rank()
    if world_size % ep_size:
        raise ValueError(
            f"ep_size={ep_size} does not divide the {world_size} ranks of this job: "
            f"use one of {[p for p in range(1, world_size + 1) if world_size % p == 0]}"
        )
    if ep_size == 1:
        return ExpertParallel(world_size=world_size, rank=rank)
    prepare_engines()
    if deepspeed_groups.is_initialized():
        ep_group, edp_group = deepspeed_private.create_expert_groups(ep_size)
    else:
        ep_group, edp_group = _create_groups(ep_size, world_size, rank)
    mailboxes = open_mailboxes(ep_group).mailboxes
    topology = ExpertParallel(ep_size, dist.get_rank(ep_group), ep_group, edp_group, world_size, rank, mailboxes)
    assert dist.get_world_size(ep_group) == ep_size and topology.ep_rank == rank % ep_size
    return topology


def _create_groups(ep_size: int, world_size: int, rank: int) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    ep_group = edp_group = None
    for start in range(0, world_size, ep_size):
        ranks = list(range(start, start + ep_size))
        group = dist.new_group(ranks)
        ep_group = group if rank in ranks else ep_group
    for offset in range(ep_size):
        ranks = list(range(offset, world_size, ep_size))
        group = dist.new_group(ranks)
        edp_group = group if rank in ranks else edp_group
    assert ep_group is not None and edp_group is not None
    return ep_group, edp_group
