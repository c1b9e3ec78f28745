"""Which dispatcher each input group gets; ``auto`` decides group by group, alike on all ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ldmole_ds.config import LDMoLEConfig
from ldmole_ds.distributed import CommStats, ExpertParallel, LocalTokenDispatcher, build_dispatcher
from ldmole_ds.distributed.dispatch_choice import Workload, choose_dispatch, explain
from ldmole_ds.distributed.link import measure_link, sending_device


@dataclass(frozen=True)
class GroupShape:
    """Sizes of an input group: E, D, O of each projection."""

    num_experts: int
    in_features: int
    out_features: list[int]


@dataclass(frozen=True)
class DispatchSettings:
    """How tokens and experts meet, and what ``auto`` may assume.

    Attributes:
        mode: tokens, weights or auto.
        chunk_tokens: Dispatch at most so many tokens of a rank at once; 0 is all.
        tokens_per_rank: Tokens of one micro-step on one rank (for auto).
        accumulation_steps: Micro-steps per optimizer step (for auto).
    """

    mode: str = "tokens"
    chunk_tokens: int = 0
    tokens_per_rank: int = 4096
    accumulation_steps: int = 1


def expected_experts(config: LDMoLEConfig) -> float:
    """Experts per token to plan with: what the router is held to, or all of them."""
    if config.router == "topk":
        return min(config.topk, config.num_experts)
    if config.router == "relu" or (config.router == "sparsegen" and config.sparsity_loss_weight):
        return min(config.target_num_experts, config.num_experts)
    return config.num_experts


def plan_dispatch(
    settings: DispatchSettings,
    shapes: list[GroupShape],
    config: LDMoLEConfig,
    topology: ExpertParallel,
    stats: CommStats,
    *,
    itemsize: int,
    device: torch.device,
) -> tuple[list[LocalTokenDispatcher], str]:
    """A dispatcher for each group, shared where they are alike, and a sentence for the start of a run.

    Collective for ``auto`` with ep_size > 1: the link is measured.
    """
    if settings.chunk_tokens < 0 or settings.tokens_per_rank < 1:
        raise ValueError(
            f"dispatch_chunk_tokens must be 0 or more and tokens_per_rank at least 1, got {settings.chunk_tokens} and "
            f"{settings.tokens_per_rank}"
        )
    modes, text = [settings.mode] * len(shapes), settings.mode
    partitioned = [i for i, shape in enumerate(shapes) if topology.partitions(shape.num_experts)]
    if settings.mode == "auto":
        modes, text = ["tokens"] * len(shapes), "auto: no experts are partitioned, so nothing moves"
        if partitioned:
            link = measure_link(topology, sending_device(topology.ep_group, device), itemsize)
            workload = Workload(
                settings.tokens_per_rank, expected_experts(config), settings.accumulation_steps, itemsize
            )
            choices = [
                choose_dispatch(
                    workload,
                    link,
                    ep_size=topology.ep_size,
                    num_experts=shapes[i].num_experts,
                    r=config.r,
                    in_features=shapes[i].in_features,
                    out_features=shapes[i].out_features,
                )
                for i in partitioned
            ]
            for i, choice in zip(partitioned, choices, strict=True):
                modes[i] = choice.mode
            text = explain(choices, workload, link)
    made: dict[tuple[int, str], LocalTokenDispatcher] = {}
    for shape, mode in zip(shapes, modes, strict=True):
        key = (shape.num_experts, mode)
        if key not in made:
            made[key] = build_dispatcher(topology, shape.num_experts, mode, stats, settings.chunk_tokens)
    return [made[shape.num_experts, mode] for shape, mode in zip(shapes, modes, strict=True)], text
