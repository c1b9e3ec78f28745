"""The dispatcher that moves no token: experts are gathered to where the tokens are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ldmole_ds.distributed.all_to_all import CommStats, largest_of
from ldmole_ds.distributed.dispatch import ExpertWeights, LocalTokenDispatcher
from ldmole_ds.distributed.expert_gather import gather_experts, gather_flat, is_outdated
from ldmole_ds.distributed.topology import ExpertParallel
from ldmole_ds.distributed.zero import is_zero3_parameter


class WeightGatherDispatcher(LocalTokenDispatcher):
    """``--expert_dispatch weights``: tokens stay, the experts' weights are gathered over the EP group.

    Cheaper than moving tokens when a group's experts are smaller than its batch of tokens. Under gradient accumulation
    they are gathered once per optimizer step (`begin_pass`), except under ZeRO-3, which lets go of them after each use.
    """

    experts_are_here = False  # before they are gathered

    def __init__(self, topology: ExpertParallel, stats: CommStats | None = None) -> None:
        super().__init__(stats)
        self.topology = topology
        self.ep_size = topology.ep_size
        self._keep = False
        self._kept: dict[str, Tensor] = {}

    def begin_pass(self, experts: Mapping[str, list[Tensor]], accumulation_steps: int) -> None:
        """Decide whether what was gathered before is used again. Collective: once before each pass of the model.

        Weights may change in ways that no counter sees (an optimizer step, a loaded checkpoint), so each rank compares
        its own part, and one change anywhere drops everything everywhere.

        Args:
            experts: By layer, the local expert parameters of the layers that this dispatcher serves.
            accumulation_steps: Micro-steps per optimizer step; with 1 nothing is kept.
        """
        zero3 = any(is_zero3_parameter(p) for params in experts.values() for p in params)
        self._keep = accumulation_steps > 1 and not zero3
        if self._kept:
            own = self.topology.ep_rank
            outdated = [is_outdated(kept, experts[layer], own) for layer, kept in self._kept.items()]
            if largest_of(torch.stack(outdated).any(), self.topology.channel(self.stats, "all layers")):
                self._kept.clear()
        if not self._keep:
            self._kept.clear()

    def gathered(self, experts: ExpertWeights, layer: str) -> ExpertWeights:
        """All experts of an input group. Collective: one all-gather forward, one reduce-scatter backward."""
        channel = self.topology.channel(self.stats, layer)
        if self._keep and layer not in self._kept:
            self._kept[layer] = gather_flat([experts.lora_A, *experts.lora_B], channel)
        lora_A, lora_B = gather_experts(experts.lora_A, experts.lora_B, channel, self._kept.get(layer))
        return replace(experts, lora_A=lora_A, lora_B=lora_B)
