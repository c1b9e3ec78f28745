"""The L1 loss of ReLU routing and the control of its weight (ReMoE, arXiv 2412.14711, sections 3.3 to 3.5).

ReLU routing has no constraint that makes it sparse. An L1 loss on the routing weights does, and its weight is found
while training: multiplied by a constant after a step in which the tokens used more experts than the target, divided by
it after a step with fewer. The loss weighs each expert's L1 norm by that expert's load, which balances the experts too:

    l1 = mean over projections and tokens of  sum_e f_e p_e          f_e = E / (k T) * tokens that use expert e

f_e is 1 for every expert where k experts per token are used evenly, and carries no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class AdaptiveL1(nn.Module):
    """Weight of the L1 loss, ``initial * growth ** exponent``; only the whole number ``exponent`` changes.

    Args:
        initial: Weight at the start.
        growth: Factor of one step, above 1.
        target: Experts per token to aim at, k.
    """

    def __init__(self, initial: float, growth: float, target: int, device: torch.device | str) -> None:
        super().__init__()
        self.initial, self.growth, self.target = initial, growth, target
        # A whole number: an engine that casts floating-point buffers to bf16 leaves it alone.
        self.register_buffer("exponent", torch.zeros((), dtype=torch.int64, device=device))
        self._weight: Tensor | None = None
        self._excess: Tensor | None = None
        self._passes = 0

    @property
    def weight(self) -> Tensor:
        """Weight of the optimizer step under way: a float32 scalar without gradient."""
        return self._current() if self._weight is None else self._weight

    def _current(self) -> Tensor:
        return self.initial * torch.pow(self.growth, self.exponent.float())

    def observe(self, active: Tensor, allowed: Tensor, accumulation_steps: int) -> None:
        """Take in one training forward pass; after the last micro-step of a step, move the weight for the next one.

        Args:
            active: Activations of all projections, tokens and ranks.
            allowed: The same if every token used k experts (or all, where a layer has fewer).
            accumulation_steps: Micro-steps of the optimizer step.
        """
        if self._passes == 0:
            self._weight, self._excess = self._current(), torch.zeros_like(active)
        self._passes += 1
        self._excess = self._excess + active - allowed
        if self._passes >= accumulation_steps:
            self.exponent += self._excess.sign().long()
            self._passes = 0


def balanced_l1_sum(prob_sums: Tensor, active: Tensor, num_tokens: Tensor, k: int) -> Tensor:
    """Sum over local tokens of ``sum_e f_e p_e``, see the module docstring: ``-> (J,)``.

    Args:
        prob_sums: Routing weights of the tokens that count, summed over them, ``(J, E)``.
        active: Tokens that use each expert, over all ranks, ``(J, E)``.
        num_tokens: Tokens over all ranks.
        k: Experts per token to aim at.
    """
    num_experts = prob_sums.shape[-1]
    load = num_experts / (min(k, num_experts) * num_tokens.clamp(min=1)) * active
    return (load * prob_sums).sum(-1)
