"""LD-MoLE as the authors compute it: every expert's output of every token, ``(B, S, E, O)``, for each projection alone.

Written from the paper's formulas, as a peer to measure against. It takes over the weights of one of our models, so that
`benchmarks/step.py` can check that both compute the same loss and the same gradients.

Shape legend: B batch, S sequence, D in_features, O out_features, E experts, r rank.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldmole_ds.layers import AdaptedLinear
from ldmole_ds.model import LDMoLEModel


def sorted_sparsegen(u: Tensor, lam: Tensor) -> Tensor:
    """Sparsegen by its closed form, differentiated by autograd: ``(..., E), (...) -> (..., E)``."""
    lam = lam.unsqueeze(-1)
    u_desc = u.sort(dim=-1, descending=True).values
    sums = u_desc.cumsum(-1)
    ranks = torch.arange(1, u.shape[-1] + 1, device=u.device)
    k = (1 - lam + ranks * u_desc > sums).sum(-1, keepdim=True)
    tau = (sums.gather(-1, k - 1) - 1 + lam) / k
    return torch.relu(u - tau) / (1 - lam)


class AllExpertsLinear(nn.Module):
    """``y = W x + alpha/r sum_i p_i B_i A_i x`` with the experts' outputs written out."""

    def __init__(self, base_layer: nn.Module, lora_A: Tensor, lora_B: Tensor, gate: Tensor, mlp, scaling, dropout):
        super().__init__()
        self.base_layer, self.scaling, self.dropout = base_layer, scaling, dropout
        self.lora_A, self.lora_B, self.gate = (nn.Parameter(t.detach().clone()) for t in (lora_A, lora_B, gate))
        self.__dict__["mlp"] = mlp  # shared by all layers of one width
        self.routing: tuple[Tensor, Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        result = self.base_layer(x)
        x = F.dropout(x, self.dropout, self.training)
        u = F.linear(x, self.gate).float()
        lam = F.logsigmoid(self.mlp(x).float().squeeze(-1)) + 0.99
        p = sorted_sparsegen(u, lam)
        self.routing = (u, p, lam)
        hidden = torch.einsum("bsd,erd->bser", x, self.lora_A)
        outputs_BSEO = torch.einsum("bser,ero->bseo", hidden, self.lora_B)
        return result + self.scaling * torch.einsum("bse,bseo->bso", p.to(x.dtype), outputs_BSEO)


class AuthorsModel(nn.Module):
    """The base model with `AllExpertsLinear` in the place of our layers; the loss includes the balance loss.

    Args:
        model: Ours, whose base model is taken over (``model`` is of no use afterwards).
        target_num_experts: k of the sparsity loss.
    """

    def __init__(self, model: LDMoLEModel) -> None:
        super().__init__()
        self.config, self.base_model = model.adapter_config, model.base_model
        self.mlps = nn.ModuleDict({width: self._mlp(m) for width, m in model.lambda_mlps.items()})
        for name, layer in list(self.base_model.named_modules()):
            if isinstance(layer, AdaptedLinear):
                group, i = layer.group, layer.member
                weights = (group.lora_A[i], group.lora_B[i], group.gate[i], self.mlps[str(group.in_features)])
                new = AllExpertsLinear(layer.base_layer, *weights, group.scaling, group.dropout)
                parent, _, leaf = name.rpartition(".")
                setattr(self.base_model.get_submodule(parent), leaf, new)
        self.layers = [m for m in self.base_model.modules() if isinstance(m, AllExpertsLinear)]
        # The base model's hooks belong to our model and its routing records.
        self.base_model._forward_pre_hooks.clear(), self.base_model._forward_hooks.clear()

    @staticmethod
    def _mlp(ours: nn.Module) -> nn.Sequential:
        first, last = nn.Linear(ours.in_features, ours.hidden_size), nn.Linear(ours.hidden_size, 1)
        state = (ours.weight_in, ours.bias_in, ours.weight_out, ours.bias_out)
        for param, value in zip((first.weight, first.bias, last.weight, last.bias), state, strict=True):
            param.data = value.detach().clone()
        return nn.Sequential(first, nn.ReLU(), last)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        """The loss: cross entropy and the weighted auxiliary losses."""
        loss = self.base_model(input_ids=input_ids, attention_mask=attention_mask, labels=labels).loss
        real = attention_mask.bool()
        balance = torch.stack([self._balance(layer.routing[1][real]) for layer in self.layers]).mean()
        sparsity = torch.stack([self._sparsity(*layer.routing)[real].mean() for layer in self.layers]).mean()
        router_z = torch.stack([layer.routing[0].logsumexp(-1)[real].square().mean() for layer in self.layers]).mean()
        weights = self.config
        return (
            loss
            + weights.load_balancing_loss_weight * balance
            + weights.sparsity_loss_weight * sparsity
            + weights.router_z_loss_weight * router_z
        )

    @staticmethod
    def _balance(p: Tensor) -> Tensor:
        active = (p > 0).sum(0)
        return p.shape[-1] * (active / active.sum() * p.mean(0)).sum()

    def _sparsity(self, u: Tensor, p: Tensor, lam: Tensor) -> Tensor:
        k = self.config.target_num_experts
        top = u.detach().sort(dim=-1, descending=True).values
        lower = 1 - (top[..., :k].sum(-1) - k * top[..., k])
        return torch.relu(lower - lam)
