"""What the router did, accumulated over forward passes: the source of logs, `routing_summary` and reports.

Shape legend: T tokens, J projections, E experts, H lambda MLP hidden units.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ldmole_ds.distributed import ExpertParallel
from ldmole_ds.layers import RoutingRecord
from ldmole_ds.model.routing_batch import FusedRoutingBatch, RoutingBatch


class RoutingStatistics:
    """Sums over the real (not padding) tokens of this rank since the last `reset`; nothing here synchronises.

    Attributes:
        members: Projection names of each input group, in the order of the model.
    """

    def __init__(self, groups: dict[str, list[str]]) -> None:
        self.members = groups
        self._sums: dict[tuple[tuple[str, int], ...], Tensor] = {}
        self._live: dict[str, Tensor] = {}

    def reset(self) -> None:
        """Start counting anew."""
        self._sums.clear()
        self._live.clear()

    def snapshot(self) -> tuple[dict, dict]:
        """The sums so far, to be put back by `swap`; counting starts anew."""
        taken = (dict(self._sums), dict(self._live))
        self.reset()
        return taken

    def swap(self, taken: tuple[dict, dict]) -> RoutingStatistics:
        """Put ``taken`` back; what was counted in between is returned."""
        between = RoutingStatistics(self.members)
        between._sums, between._live = self._sums, self._live
        self._sums, self._live = dict(taken[0]), dict(taken[1])
        return between

    @torch.no_grad()
    def add(self, batches: list[RoutingBatch | FusedRoutingBatch], records: list[RoutingRecord]) -> None:
        """Add one forward pass."""
        for batch in batches:
            active_JE = batch.active.double()
            tokens_J = batch.num_tokens.double().expand(len(batch.names))
            rows = torch.cat([active_JE, torch.stack([tokens_J, *batch.lambda_moments()], 1)], 1)
            key = tuple(batch.names)
            self._sums[key] = rows if key not in self._sums else self._sums[key] + rows
        for record in records:
            if record.live_units_H is not None:
                live = self._live.get(record.group)
                self._live[record.group] = record.live_units_H if live is None else live | record.live_units_H

    def _merged(self) -> tuple[list[tuple[str, int]], list[Tensor]]:
        """Keys, and per key ``[active (E,), tokens, lambda sum, lambda square sum]`` of this rank.

        The keys come in the model's order, so that every rank reduces the same layout.
        """
        merged: dict[tuple[str, int], Tensor] = {}
        for names, rows_JX in self._sums.items():
            for name, row in zip(names, rows_JX, strict=True):
                merged[name] = merged[name] + row if name in merged else row
        keys = [key for key in ((g, j) for g in self.members for j in range(len(self.members[g]))) if key in merged]
        return keys, [merged[key] for key in keys]

    def totals(self, reduce: bool = False, riders: Tensor | None = None) -> tuple[dict[str, dict], list[float]]:
        """`summary` without the hidden units, with one reduction and one copy to the host for everything.

        Args:
            reduce: Sum over all ranks first. Collective.
            riders: ``(n,)`` float64, further numbers to sum in the same reduction.

        Returns:
            Statistics by projection, and the riders' sums.
        """
        keys, rows = self._merged()
        parts = rows if riders is None else [*rows, riders]
        if not parts:
            return {}, []
        flat = torch.cat(parts)
        if reduce and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(flat)
        rows = list(flat.cpu().split([part.numel() for part in parts]))
        sums = rows.pop().tolist() if riders is not None else []
        result = {}
        for (group, j), row in zip(keys, rows, strict=True):
            stats = self._row(row)
            if group not in self._live:
                stats["lambda_mean"] = stats["lambda_std"] = None
            result[self.members[group][j]] = {"group": group, **stats}
        return result, sums

    def load_by_rank(self, topology: ExpertParallel, travelling: set[str]) -> Tensor:
        """How many activations (a token's use of an expert) each rank computes: this rank's tokens, ``(W,)`` float64.

        Args:
            topology: Who holds which experts.
            travelling: Names of the groups whose tokens go to the rank of their experts; others are computed at home.
        """
        device = next((rows.device for rows in self._sums.values()), "cpu")
        loads_W = torch.zeros(topology.world_size, dtype=torch.float64, device=device)
        first = topology.rank - topology.ep_rank
        for names, rows_JX in self._sums.items():
            active_JE = rows_JX[:, :-3]
            away = [j for j, (group, _) in enumerate(names) if group in travelling]
            home = [j for j, (group, _) in enumerate(names) if group not in travelling]
            if away:
                by_peer = active_JE[away].view(len(away), topology.ep_size, -1).sum((0, 2))
                loads_W[first : first + topology.ep_size] += by_peer
            loads_W[topology.rank] += active_JE[home].sum()
        return loads_W

    def means(self, reduce: bool = False) -> dict[str, float]:
        """`mean_routing` of what was counted.

        Args:
            reduce: Sum over all ranks first. Collective.
        """
        return mean_routing(self.totals(reduce)[0])

    @staticmethod
    def _row(row: Tensor) -> dict:
        active, (tokens, lam_sum, lam_square_sum) = row[:-3], row[-3:].tolist()
        tokens = max(tokens, 1.0)
        lam_mean = lam_sum / tokens
        load = active / active.sum().clamp(min=1)
        return {
            "tokens": int(tokens),
            "experts_per_token": active.sum().item() / tokens,
            "load": load.tolist(),
            "max_load": load.max().item() * load.numel(),
            "dead_experts": int((active == 0).sum()),
            "lambda_mean": lam_mean,
            "lambda_std": max(lam_square_sum / tokens - lam_mean**2, 0.0) ** 0.5,
        }

    def summary(self, reduce: bool = False) -> dict[str, dict]:
        """Per projection, by full module name.

        Returns:
            ``{projection: {tokens, experts_per_token, load (E shares), max_load (1 = balanced), dead_experts,
            lambda_mean, lambda_std (over tokens), live_hidden_units, hidden_units, group}}``; lambda's are None for
            routers without one.
        """
        result, _ = self.totals(reduce)
        live = dict(self._live)
        if reduce and live and dist.is_initialized() and dist.get_world_size() > 1:
            names = [g for g in self.members if g in live]
            flat = torch.cat([live[g] for g in names]).int()
            dist.all_reduce(flat, op=dist.ReduceOp.MAX)
            live = dict(zip(names, (flat > 0).split([live[g].numel() for g in names]), strict=True))
        for stats in result.values():
            units = live.get(stats["group"])
            stats["live_hidden_units"] = None if units is None else int(units.sum())
            stats["hidden_units"] = None if units is None else units.numel()
        return result


def mean_routing(projections: dict[str, dict]) -> dict[str, float]:
    """Over the projections of `RoutingStatistics.totals`: ``experts_per_token``, ``lambda_mean`` and ``lambda_std``
    (spread over tokens; both absent without lambda), ``max_load`` (busiest expert over the mean one; 1 is balance) as
    means, and ``dead_experts`` (experts that no token used) as their number in all projections together."""
    rows = list(projections.values())
    if not rows:
        return {}
    names = ["experts_per_token", "max_load"]
    if all(row["lambda_mean"] is not None for row in rows):
        names += ["lambda_mean", "lambda_std"]
    means: dict[str, float] = {name: sum(row[name] for row in rows) / len(rows) for name in names}
    return {**means, "dead_experts": sum(row["dead_experts"] for row in rows)}
