"""What the router did, accumulated over forward passes: the source of logs, `routing_summary` and reports.

Shape legend: T tokens, J projections, E experts, H lambda MLP hidden units.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ldmole_ds.layers import RoutingRecord
from ldmole_ds.model.aux_losses import RoutingBatch


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
    def add(self, batches: list[RoutingBatch], records: list[RoutingRecord]) -> None:
        """Add one forward pass."""
        for batch in batches:
            active_JE = batch.active.double()
            tokens_J = batch.num_tokens.double().expand(len(batch.names))
            lam_J = lam_square_J = torch.zeros_like(tokens_J)
            if batch.lam_TJ is not None:
                lam = batch.lam_TJ.double()
                lam = lam if batch.mask_T is None else torch.where(batch.mask_T.unsqueeze(1), lam, 0.0)
                lam_J, lam_square_J = lam.sum(0), lam.square().sum(0)
            rows = torch.cat([active_JE, torch.stack([tokens_J, lam_J, lam_square_J], 1)], 1)
            key = tuple(batch.names)
            self._sums[key] = rows if key not in self._sums else self._sums[key] + rows
        for record in records:
            if record.live_units_H is not None:
                live = self._live.get(record.group)
                self._live[record.group] = record.live_units_H if live is None else live | record.live_units_H

    def _stacked(self, reduce: bool) -> tuple[list[tuple[str, int]], list[Tensor]]:
        """Keys, and per key ``[active (E,), tokens, lambda sum, lambda square sum]``; summed over ranks on demand.

        The keys come in the model's order, so that every rank reduces the same layout.
        """
        merged: dict[tuple[str, int], Tensor] = {}
        for names, rows_JX in self._sums.items():
            for name, row in zip(names, rows_JX, strict=True):
                merged[name] = merged[name] + row if name in merged else row
        keys = [key for key in ((g, j) for g in self.members for j in range(len(self.members[g]))) if key in merged]
        rows = [merged[key] for key in keys]
        if reduce and rows and dist.is_initialized() and dist.get_world_size() > 1:
            flat = torch.cat(rows)
            dist.all_reduce(flat)
            rows = list(flat.split([row.numel() for row in rows]))
        return keys, [row.cpu() for row in rows]

    def means(self, reduce: bool = False) -> dict[str, float]:
        """Over all projections: mean experts per token, mean lambda, its spread over tokens, busiest expert's load.

        Args:
            reduce: Sum over all ranks first. Collective.
        """
        _, rows = self._stacked(reduce)
        if not rows:
            return {}
        stats = [self._row(row) for row in rows]
        names = ("experts_per_token", "lambda_mean", "lambda_std", "max_load")
        return {name: sum(s[name] for s in stats) / len(stats) for name in names}

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
            "lambda_mean": lam_mean,
            "lambda_std": max(lam_square_sum / tokens - lam_mean**2, 0.0) ** 0.5,
        }

    def summary(self, reduce: bool = False) -> dict[str, dict]:
        """Per projection, by full module name.

        Returns:
            ``{projection: {tokens, experts_per_token, load (E shares), max_load (1 = balanced), lambda_mean,
            lambda_std (over tokens), live_hidden_units, hidden_units, group}}``; lambda's are None for routers
            without one.
        """
        keys, rows = self._stacked(reduce)
        live = dict(self._live)
        if reduce and live and dist.is_initialized() and dist.get_world_size() > 1:
            names = [g for g in self.members if g in live]
            flat = torch.cat([live[g] for g in names]).int()
            dist.all_reduce(flat, op=dist.ReduceOp.MAX)
            live = dict(zip(names, (flat > 0).split([live[g].numel() for g in names]), strict=True))
        result = {}
        for (group, j), row in zip(keys, rows, strict=True):
            stats = self._row(row)
            units = live.get(group)
            if units is None:
                stats["lambda_mean"] = stats["lambda_std"] = None
            stats["live_hidden_units"] = None if units is None else int(units.sum())
            stats["hidden_units"] = None if units is None else units.numel()
            result[self.members[group][j]] = {"group": group, **stats}
        return result
