"""A frozen linear layer with experts beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ldmole_ds.ops.frozen_product import frozen_linear, frozen_product, is_plain
from ldmole_ds.ops.grouped_update import Update
from ldmole_ds.ops.low_rank_update import LowRankUpdate

if TYPE_CHECKING:
    from ldmole_ds.layers.input_group import InputGroup


class AdaptedLinear(nn.Module):
    """``y = W x + (alpha / r) sum_i p_i B_i A_i x``: the frozen layer, and its share of its input group's result.

    It owns no adapter parameters; the input group does, and is registered once on the model.
    """

    def __init__(self, base_layer: nn.Module, group: InputGroup, member: int) -> None:
        super().__init__()
        self.base_layer = base_layer
        # Not registered as a child: several adapted linears share one group.
        self.__dict__["group"] = group
        self.member = member
        group.layers[member] = self

    def forward(self, x: Tensor) -> Tensor:
        """``(..., D) -> (..., O)``."""
        if not self.group.holder.enabled:
            return self.base_layer(x)
        if self.group.gives_outputs(self.member, x):
            return self.group.output_of(self.member, x)
        plain = not torch.compiler.is_compiling() and is_plain(self.base_layer, x)
        update, results = self.group.update_of(self.member, x, hand_on=plain), self.group.results
        x_TD, more = results.handed_on, results.pending is not None
        results.handed_on = x_TD if more else None
        in_factors = isinstance(update, LowRankUpdate) and update.h_XT.dtype == x.dtype
        if not plain or not in_factors or x_TD is None:
            return self.add(update, frozen_linear(self.base_layer, x))
        y, x_TD = frozen_product(self.base_layer, x_TD, update, x.shape[:-1], hand_on=more)
        results.handed_on = x_TD if more else None
        return y

    def add(self, update: Tensor | Update, y: Tensor) -> Tensor:
        """The frozen layer's output ``y`` with the update, in place where nobody else has seen it."""
        if isinstance(update, Tensor):
            return y + update.to(y.dtype)  # they differ under autocast only
        return update.add_to(y, in_place=self._owns_output())

    def _owns_output(self) -> bool:
        """Whether the frozen layer's output is a new tensor that nobody else has seen."""
        hooks = self.base_layer._forward_hooks or torch.nn.modules.module._global_forward_hooks
        return isinstance(self.base_layer, nn.Linear) and not hooks

    @property
    def weight(self) -> Tensor:
        """The frozen weight (models read its dtype or device)."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        """The frozen bias."""
        return self.base_layer.bias

    @property
    def in_features(self) -> int:
        return self.group.in_features

    @property
    def out_features(self) -> int:
        return self.group.out_features[self.member]
