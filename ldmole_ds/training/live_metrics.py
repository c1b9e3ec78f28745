"""What a training run tells about itself between two logs: losses, routing, traffic, speed.

Everything is summed on the device as training goes; a log reduces it over ranks at once and copies it to the host
once. Every rank then has the same numbers.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ldmole_ds.distributed import AllToAllTokenDispatcher
from ldmole_ds.model import LDMoLEModel
from ldmole_ds.model.routing_stats import RoutingStatistics, mean_routing
from ldmole_ds.training.flops import TrainingFlops


class TokenCounts:
    """Of one optimizer step or more: tokens that are not padding, all tokens, labels, pairs that attend."""

    def __init__(self, counts: Tensor | None = None) -> None:
        self.real, self.padded, self.answers, self.pairs = [0] * 4 if counts is None else counts.tolist()

    def __iadd__(self, other: TokenCounts) -> TokenCounts:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)
        return self


def count_tokens(batch: dict[str, Any]) -> Tensor:
    """``(4,)`` int64 of one micro-batch, in the order of `TokenCounts`; causal attention is assumed."""
    ids, labels = batch["input_ids"], batch.get("labels")
    mask = batch.get("padding_mask", batch.get("attention_mask"))  # packed rows come with the first and a 4-D second
    real = mask.ne(0) if isinstance(mask, Tensor) and mask.dim() == 2 else torch.ones_like(ids, dtype=torch.bool)
    position = batch.get("position_ids")  # they start anew with each document of a packed row
    if position is None or position.shape != real.shape:
        position = real.cumsum(-1) - 1
    answers = real.sum() if labels is None else labels.ne(-100).sum()
    return torch.stack(
        [real.sum(), torch.as_tensor(ids.numel()).to(ids.device), answers, ((position + 1) * real).sum()]
    )


class LogWindow:
    """The time since the last log.

    Args:
        model: Whose routing and traffic are counted.
        step: Optimizer steps so far.
        peak_tflops: Of one device, for MFU; None: no MFU.
    """

    def __init__(self, model: LDMoLEModel, step: int, peak_tflops: float | None = None) -> None:
        self.model = model
        self.peak_tflops = peak_tflops
        self.flops = TrainingFlops(model)
        self.projections: dict[str, dict] = {}
        self.operations = 0.0
        self.restart(step)

    def restart(self, step: int) -> None:
        """Begin anew, at this optimizer step."""
        self.model.routing.reset()
        self.tokens, self.losses = TokenCounts(), {}
        self.step, self.start, self._bytes = step, time.perf_counter(), self.model.comm_stats.total_bytes

    def add_loss(self, name: str, value: Tensor) -> None:
        """Add a rank's share of one step's loss."""
        self.losses[name] = self.losses.get(name, 0.0) + value.detach().double()

    @contextmanager
    def paused(self) -> Iterator[RoutingStatistics]:
        """What happens inside is no part of the window. Yields statistics that hold its routing afterwards."""
        begin, sent = time.perf_counter(), self.model.comm_stats.total_bytes
        outside, inside = self.model.routing.snapshot(), RoutingStatistics(self.model.routing.members)
        try:
            yield inside
        finally:
            self.start += time.perf_counter() - begin
            self._bytes += self.model.comm_stats.total_bytes - sent
            inside.swap(self.model.routing.swap(outside).snapshot())

    def metrics(self, step: int) -> tuple[dict[str, float], float]:
        """The window's metrics and seconds, the same on every rank; fills `projections` and
        `operations`. Collective.

        Args:
            step: Optimizer steps so far.
        """
        model, steps = self.model, max(step - self.step, 1)
        topology, world_size = model.topology, model.topology.world_size
        away = {g.name for g in model.input_groups if isinstance(g.dispatcher, AllToAllTokenDispatcher)}
        loads_W = model.routing.load_by_rank(topology, away)
        seconds, sent = time.perf_counter() - self.start, model.comm_stats.total_bytes - self._bytes
        device = next(model.input_groups[0].parameters()).device
        losses = [torch.as_tensor(value, device=device) for value in self.losses.values()]
        host = torch.tensor([sent, seconds], dtype=torch.float64).to(device)
        riders = torch.cat([loads_W.to(device), host, *(value.view(1) for value in losses)])
        self.projections, sums = model.routing.totals(reduce=world_size > 1, riders=riders)
        loads, (sent, seconds), losses = sums[:world_size], sums[world_size : world_size + 2], sums[world_size + 2 :]
        seconds = max(seconds / world_size, 1e-9)
        metrics = {
            f"{name}_loss": round(v / steps / world_size, 6) for name, v in zip(self.losses, losses, strict=True)
        }
        metrics |= {name: round(value, 4) for name, value in mean_routing(self.projections).items()}
        if sum(loads):
            metrics["max_rank_load"] = round(max(loads) * world_size / sum(loads), 4)
        metrics["dispatch_bytes_per_step"] = round(sent / steps)
        metrics["tokens_per_second"] = round(self.tokens.real / seconds, 1)
        self.operations = self.flops.of(self.tokens.real, self.tokens.answers, self.tokens.pairs, self.projections)
        if self.peak_tflops:
            metrics["mfu"] = round(self.operations / (seconds * world_size * self.peak_tflops * 1e12), 6)
        return metrics, seconds
