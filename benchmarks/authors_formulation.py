"""LD-MoLE as the authors compute it: every expert's output of every token, ``(B, S, E, O)``, for each projection alone.

Written from the formulas and from what their released code does in which order, as a peer to measure against. It
takes over the weights of one of our models, so that `benchmarks/step.py` can check that both compute the same loss and
the same gradients. Each expert's A and B are parameters of their own, put together in every forward pass; the input is
given to the experts one by one (a batched product over E views of it); inputs, logits and weights are searched for
values that are not finite. `OneProductLinear` does without these three: the kindest reading of the formula.

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
    """``y = W x + alpha/r sum_i p_i B_i A_i x`` with the experts' outputs written out.

    Args:
        base_layer: The frozen projection.
        lora_A: (E, r, D).
        lora_B: (E, r, O).
        gate: (E, D), the router.
        mlp: The lambda MLP, shared by all layers of one width.
        scaling: alpha / r.
        dropout: Probability.
    """

    def __init__(
        self, base_layer: nn.Module, lora_A: Tensor, lora_B: Tensor, gate: Tensor, mlp: nn.Module, scaling, dropout
    ) -> None:
        super().__init__()
        self.base_layer, self.scaling, self.dropout = base_layer, scaling, dropout
        self.gate = nn.Parameter(gate.detach().clone())
        self.__dict__["mlp"] = mlp  # a parameter of the model, not of every layer
        self.routing: tuple[Tensor, Tensor, Tensor] | None = None
        self._take(lora_A.detach(), lora_B.detach())

    def _take(self, lora_A: Tensor, lora_B: Tensor) -> None:
        self.experts_A = nn.ParameterList(a.clone() for a in lora_A)
        self.experts_B = nn.ParameterList(b.T.clone() for b in lora_B)  # (O, r), as of a linear layer

    def forward(self, x: Tensor) -> Tensor:
        result = self.base_layer(x)
        x = F.dropout(x, self.dropout, self.training)
        outputs_BSEO = self._experts(x)
        self._check(x)
        u = F.linear(x, self.gate).float()
        self._check(u)
        lam = F.logsigmoid(self.mlp(x).float().squeeze(-1)) + 0.99
        p = sorted_sparsegen(u, lam)
        self._check(p)
        self.routing = (u, p, lam)
        return result + self.scaling * torch.einsum("bse,bseo->bso", p.to(x.dtype), outputs_BSEO)

    def _experts(self, x: Tensor) -> Tensor:
        """``(B, S, D) -> (B, S, E, O)``."""
        A_ErD, B_EOr = torch.stack(list(self.experts_A)), torch.stack(list(self.experts_B))
        x_BSED = x.unsqueeze(2).expand(-1, -1, len(A_ErD), -1)
        hidden = torch.einsum("bsed,erd->bser", x_BSED, A_ErD)
        return torch.einsum("bser,eor->bseo", hidden, B_EOr)

    @staticmethod
    def _check(x: Tensor) -> None:
        if x.isnan().any() or x.isinf().any():
            raise FloatingPointError("the peer met a value that is not finite: its timings would mean nothing")

    def expert_grads(self) -> tuple[Tensor, Tensor]:
        """Gradients of A and B: (E, r, D), (E, r, O)."""
        return torch.stack([a.grad for a in self.experts_A]), torch.stack([b.grad.T for b in self.experts_B])


class OneProductLinear(AllExpertsLinear):
    """The same with the experts' parameters stacked for good, one product by all A, and no search of the values."""

    def _take(self, lora_A: Tensor, lora_B: Tensor) -> None:
        self.lora_A, self.lora_B = nn.Parameter(lora_A.clone()), nn.Parameter(lora_B.clone())

    def _experts(self, x: Tensor) -> Tensor:
        hidden = torch.einsum("bsd,erd->bser", x, self.lora_A)
        return torch.einsum("bser,ero->bseo", hidden, self.lora_B)

    @staticmethod
    def _check(x: Tensor) -> None:
        pass

    def expert_grads(self) -> tuple[Tensor, Tensor]:
        return self.lora_A.grad, self.lora_B.grad


class AuthorsModel(nn.Module):
    """The base model with such layers in the place of ours; the loss includes the auxiliary losses.

    Args:
        model: Ours, whose base model is taken over (``model`` is of no use afterwards).
        layer_class: `AllExpertsLinear` or `OneProductLinear`.
    """

    def __init__(self, model: LDMoLEModel, layer_class: type[AllExpertsLinear] = AllExpertsLinear) -> None:
        super().__init__()
        self.config, self.base_model = model.adapter_config, model.base_model
        self.mlps = nn.ModuleDict({width: self._mlp(m) for width, m in model.lambda_mlps.items()})
        for name, layer in list(self.base_model.named_modules()):
            if isinstance(layer, AdaptedLinear):
                group, i = layer.group, layer.member
                weights = (group.lora_A[i], group.lora_B[i], group.gate[i], self.mlps[str(group.in_features)])
                new = layer_class(layer.base_layer, *weights, group.scaling, group.dropout)
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
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
        loss = self.base_model(**inputs, use_cache=False).loss
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
