"""The learned lambda: a small MLP from the token to the one number that sets how many experts it uses."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LAMBDA_EPS = 1e-2
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

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """``(T, D) -> lambda (T,) float32, live units (H,) bool without gradient``. Computed in float32."""
        hidden_TH = F.relu(F.linear(x_TD.float(), self.weight_in.float(), self.bias_in.float()))
        logit_T = F.linear(hidden_TH, self.weight_out.float(), self.bias_out.float()).squeeze(-1)
        live_units_H = (hidden_TH.detach() > 0).any(0)
        return F.logsigmoid(logit_T) + (1 - LAMBDA_EPS), live_units_H
