"""LD-MoLE as the paper's formulas read, on a whole Hugging Face model: the oracle of `test_authors_curve.py`.

It shares no code with the package. Every expert is a pair of linear layers and computes every token, the outputs of all
experts are written out as (B, S, E, O), Sparsegen sorts and is differentiated by autograd, every projection routes on
its own, and one process sees the whole batch. Modules are named so that `state_dict` has the authors' keys.

Shape legend: B and S batch and sequence, D in_features, O out_features, E experts, r rank, H hidden units.
"""

import torch
from torch import nn
from torch.nn import functional as F

EPS = 1e-2
PREFIX = "base_model.model."


class SharedMLPs(nn.Module):
    """One ``Linear(D, H) ReLU Linear(H, 1)`` per input width; a single instance serves the whole model."""

    def __init__(self, widths, hidden_size):
        super().__init__()
        mlps = {str(d): nn.Sequential(nn.Linear(d, hidden_size), nn.ReLU(), nn.Linear(hidden_size, 1)) for d in widths}
        self.proj_layers = nn.ModuleDict(mlps)

    def forward(self, x):
        return self.proj_layers[str(x.shape[-1])](x).squeeze(-1)


class Sparsegen(nn.Module):
    """``(x (..., D), u (..., E)) -> p (..., E), lambda (...)``."""

    def __init__(self, mlp):
        super().__init__()
        self.mlp = mlp

    def forward(self, x, u):
        lam = F.logsigmoid(self.mlp(x)) + (1 - EPS)
        largest_first = u.sort(dim=-1, descending=True).values
        partial_sums = largest_first.cumsum(-1)
        count = torch.arange(1, u.shape[-1] + 1)
        inside = 1 - lam.unsqueeze(-1) + count * largest_first > partial_sums
        k = inside.sum(-1, keepdim=True)
        tau = (partial_sums.gather(-1, k - 1) - 1 + lam.unsqueeze(-1)) / k
        return F.relu(u - tau) / (1 - lam.unsqueeze(-1)), lam


class ExpertLinear(nn.Module):
    """``y = W x + alpha/r sum_i p_i B_i A_i x``; keeps the last call's ``(u, p, lambda)`` for the losses."""

    def __init__(self, base_layer, num_experts, r, alpha, sparsegen):
        super().__init__()
        self.base_layer, self.num_experts, self.scaling = base_layer, num_experts, alpha / r
        for i in range(num_experts):
            setattr(self, f"lora_A{i}", nn.Linear(base_layer.in_features, r, bias=False))
            setattr(self, f"lora_B{i}", nn.Linear(r, base_layer.out_features, bias=False))
        self.lora_route = nn.Linear(base_layer.in_features, num_experts, bias=False)
        self.sparsegen = sparsegen

    def forward(self, x):
        u = self.lora_route(x)
        p, lam = self.sparsegen(x, u)
        self.routing = (u, p, lam)
        experts = [getattr(self, f"lora_B{i}")(getattr(self, f"lora_A{i}")(x)) for i in range(self.num_experts)]
        outputs_BSEO = torch.stack(experts, dim=2)
        return self.base_layer(x) + self.scaling * (p.unsqueeze(-1) * outputs_BSEO).sum(2)


class AuthorsModel(nn.Module):
    """``base_model`` with experts on every linear layer but the head; returns ``(loss, logits, auxiliary losses)``."""

    def __init__(self, base_model, *, num_experts, r, alpha, hidden_size, target_num_experts, weights):
        super().__init__()
        self.model = base_model.requires_grad_(False)
        self.target_num_experts, self.weights = target_num_experts, weights
        linear = {n: m for n, m in base_model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
        sparsegen_mlp = SharedMLPs({m.in_features for m in linear.values()}, hidden_size)
        for name, layer in linear.items():
            parent, _, leaf = name.rpartition(".")
            new = ExpertLinear(layer, num_experts, r, alpha, Sparsegen(sparsegen_mlp))
            setattr(base_model.get_submodule(parent), leaf, new)

    @property
    def layers(self):
        return [module for module in self.modules() if isinstance(module, ExpertLinear)]

    def forward(self, input_ids, attention_mask, labels):
        out = self.model(input_ids=input_ids, attention_mask=attention_mask, labels=labels)
        routing = [layer.routing for layer in self.layers]
        aux = {
            "sparsity": mean(sparsity(u, lam, self.target_num_experts) for u, _, lam in routing),
            "load_balancing": mean(load_balancing(p, attention_mask) for _, p, _ in routing),
            "router_z": mean(router_z(u) for u, _, _ in routing),
        }
        return out.loss + sum(self.weights[name] * value for name, value in aux.items()), out.logits, aux

    def adapter_state(self):
        """The adapter under the authors' keys: the lambda MLPs appear under every layer."""
        adapter = {n: v for n, v in self.model.state_dict().items() if ".lora_" in n or ".sparsegen." in n}
        return {PREFIX + name: value.clone() for name, value in adapter.items()}


def mean(values):
    return torch.stack(list(values)).mean()


def sparsity(u, lam, k):
    """Mean over all positions, padding too, of ``relu(lower_k - lambda)`` with ``lower_k = 1 - (U_k - k u_(k+1))``."""
    largest_first = u.detach().sort(dim=-1, descending=True).values
    lower = 1 - (largest_first[..., :k].sum(-1) - k * largest_first[..., k])
    return F.relu(lower - lam).mean()


def load_balancing(p, attention_mask):
    """``E sum_e f_e P_e`` over real tokens: f_e expert e's share of all activations, P_e its mean weight."""
    real = p[attention_mask.bool()]
    active = (real > 0).float()
    share = active.sum(0) / active.sum()
    return p.shape[-1] * (share * real.mean(0)).sum()


def router_z(u):
    """Mean over all positions, padding too, of ``log(sum_e exp u_e)^2``."""
    return u.exp().sum(-1).log().square().mean()
