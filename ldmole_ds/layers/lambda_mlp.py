"""The learned lambda: a small MLP from the token to the one number that sets how many experts it uses."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldmole_ds.ops.routing_spec import LAMBDA_TOP
from ldmole_ds.ops.shared_input import shared_input

BIAS_INIT = -2.5


class LambdaMLP(nn.Module):
    """``lambda(x) = logsigmoid(W2 relu(W1 x + b1) + b2) + (1 - eps)``, eps = 1e-2, so lambda < 1.

    LD-MoLE (arXiv 2509.25684), section 3.2. One such module serves every layer of one input width.

    The authors start both biases at -2.5. That leaves every hidden unit dead on most inputs of a real model, and lambda
    a constant that only the output bias moves. With ``init="live"`` the hidden bias starts at 0, so that lambda varies
    by token from the first step; the output bias stays -2.5. ``init="paper"`` gives the authors' start.
    """

    def __init__(
        self,
        in_features: int,
        hidden_size: int,
        *,
        init: str = "live",
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.hidden_size = in_features, hidden_size

        def uniform(rows: int, columns: int) -> nn.Parameter:
            weight = (torch.rand(rows, columns, generator=generator) * 2 - 1) / math.sqrt(columns)
            return nn.Parameter(weight.to(device=device, dtype=dtype))

        hidden_bias = 0.0 if init == "live" else BIAS_INIT
        self.weight_in = uniform(hidden_size, in_features)
        self.bias_in = nn.Parameter(torch.full((hidden_size,), hidden_bias, dtype=dtype, device=device))
        self.weight_out = uniform(1, hidden_size)
        self.bias_out = nn.Parameter(torch.full((1,), BIAS_INIT, dtype=dtype, device=device))

    @property
    def first_layer(self) -> tuple[Tensor, Tensor]:
        """Weight ``(H, D)`` and bias ``(H,)`` of what `shared_input` computes together with the router."""
        return self.weight_in, self.bias_in

    def logit_of(self, hidden_HT: Tensor) -> tuple[Tensor, Tensor]:
        """From the hidden units: logsigmoid's argument ``(T,) float32, live units (H,) bool without gradient``."""
        dtype = hidden_HT.dtype
        # As a product of matrices: the gradient of the hidden units then lies in memory as they do.
        logit_T = torch.addmm(self.bias_out.to(dtype), self.weight_out.to(dtype), hidden_HT)[0]
        live_units_H = hidden_HT.detach().sum(1) > 0  # a sum is much quicker than any() and the units are not negative
        return logit_T, live_units_H

    def lambda_of(self, hidden_HT: Tensor) -> tuple[Tensor, Tensor]:
        """From the hidden units: ``lambda (T,) float32, live units (H,) bool without gradient``."""
        logit_T, live_units_H = self.logit_of(hidden_HT)
        return F.logsigmoid(logit_T) + LAMBDA_TOP, live_units_H

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """``(T, D) -> lambda (T,) float32, live units (H,) bool without gradient``. Computed in float32."""
        return self.lambda_of(shared_input(x_TD, None, None, self.first_layer)[2])
