"""One adapted linear layer on the ranks of an EP group, in a form that benchmarks can compare.

    y = W x + scaling * sum_i p_i B_i A_i x        p = softmax over the k largest of G x

All have the same frozen weight, router and experts, so outputs and gradients must agree. `ours` can have LD-MoLE's own
router instead, with lambda set so that a token uses k experts on average. Shapes: T tokens, D in_features, O
out_features, E experts, e = E/P of them local, r rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ldmole_ds.distributed import CommStats, ExpertParallel, build_dispatcher, expert_parallel
from ldmole_ds.layers import AdaptedLinear, InputGroup, build_router
from ldmole_ds.layers.context import ContextHolder
from ldmole_ds.layers.lambda_mlp import LambdaMLP
from ldmole_ds.ops import sparsegen

SPARSEGEN, TOPK = "sparsegen", "topk"


@dataclass(frozen=True)
class Sizes:
    """Sizes of the layer; ``tokens`` are those of a rank, ``k`` the experts of a token."""

    tokens: int
    in_features: int
    out_features: int
    experts: int
    r: int
    k: int
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Weights:
    """All experts: ``frozen (O, D)``, ``gate (E, D)``, ``lora_A (E, r, D)``, ``lora_B (E, r, O)``; and the input."""

    frozen: Tensor
    gate: Tensor
    lora_A: Tensor
    lora_B: Tensor
    x: Tensor
    cotangent: Tensor
    scaling: float = 2.0

    @classmethod
    def make(cls, sizes: Sizes, rank: int, device: torch.device) -> Weights:
        """The same weights on every rank, tokens of its own on each."""
        shared, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1 + rank)
        t, d, o, e, r = sizes.tokens, sizes.in_features, sizes.out_features, sizes.experts, sizes.r

        def normal(generator: torch.Generator, std: float, *shape: int) -> Tensor:
            return (torch.randn(*shape, generator=generator) * std).to(device, sizes.dtype)

        shapes = {"frozen": (o, d), "gate": (e, d), "lora_A": (e, r, d), "lora_B": (e, r, o)}
        stds = {"frozen": d**-0.5, "gate": d**-0.5, "lora_A": d**-0.5, "lora_B": 0.02}
        made = {name: normal(shared, stds[name], *shape) for name, shape in shapes.items()}
        return cls(**made, x=normal(own, 1.0, t, d), cotangent=normal(own, 1.0, t, o))


@dataclass(frozen=True)
class Formulation:
    """A layer, where its gradients are (``(E, D)``, ``(e, r, D)``, ``(e, r, O)``), and what a step runs within.

    ``experts`` are those of the parameters that belong to experts.
    """

    forward: Callable[[Tensor], Tensor]
    parameters: list[nn.Parameter]
    gradients: Callable[[], dict[str, Tensor]]
    experts: Sequence[nn.Parameter] = ()
    around: Callable[[], AbstractContextManager] = nullcontext

    def step(self, x: Tensor, cotangent: Tensor) -> tuple[Tensor, Tensor]:
        """Forward and backward: the output and the gradient of ``x``."""
        for param in self.parameters:
            param.grad = None
        x = x.detach().requires_grad_()
        with self.around():
            y = self.forward(x)
            y.backward(cotangent)
        return y.detach(), x.grad


def frozen_linear(weights: Weights) -> nn.Linear:
    o, d = weights.frozen.shape
    layer = nn.Linear(d, o, bias=False, device=weights.frozen.device, dtype=weights.frozen.dtype)
    layer.weight.data = weights.frozen
    return layer.requires_grad_(False)


def frozen(weights: Weights) -> Formulation:
    return Formulation(frozen_linear(weights), [], dict)


def lambda_mlp(weights: Weights, sizes: Sizes, hidden_size: int) -> LambdaMLP:
    """With the output bias at which a token uses k experts on average: the same on every rank."""
    args = {"dtype": sizes.dtype, "device": weights.x.device}
    mlp = LambdaMLP(sizes.in_features, hidden_size, generator=torch.Generator().manual_seed(3), **args)
    x_TD = torch.randn(1024, sizes.in_features, generator=torch.Generator().manual_seed(4)).to(**args)
    logits, (low, high) = (x_TD @ weights.gate.t()).float(), (-12.0, 12.0)
    with torch.no_grad():
        for _ in range(30):
            mlp.bias_out.fill_((low + high) / 2)
            support = (sparsegen(logits, mlp(x_TD)[0]) > 0).sum(-1).float().mean().item()
            low, high = (mlp.bias_out.item(), high) if support > sizes.k else (low, mlp.bias_out.item())
    return mlp


def ours(
    weights: Weights, sizes: Sizes, topology: ExpertParallel, mode: str, router: str = TOPK, lambda_hidden: int = 256
) -> Formulation:
    """This package's layer under ``--expert_dispatch mode``, with this router."""
    mlp = lambda_mlp(weights, sizes, lambda_hidden) if router == SPARSEGEN else None
    group = InputGroup(
        name="layer",
        members=["layer"],
        in_features=sizes.in_features,
        out_features=[sizes.out_features],
        num_experts=sizes.experts,
        r=sizes.r,
        scaling=weights.scaling,
        dropout=0.0,
        router=build_router(router, topk=sizes.k),
        lambda_mlp=mlp,
        owns_lambda_mlp=mlp is not None,
        topology=topology,
        dispatcher=build_dispatcher(topology, sizes.experts, mode, CommStats()),
        holder=ContextHolder(),
        mask_padding=True,
        seed=0,
        dtype=sizes.dtype,
        device=weights.x.device,
    )
    local = topology.local_experts(sizes.experts)
    with torch.no_grad():
        group.gate[0].copy_(weights.gate)
        group.lora_A[0].copy_(weights.lora_A[local.start : local.stop])
        group.lora_B[0].copy_(weights.lora_B[local.start : local.stop])
    layer = AdaptedLinear(frozen_linear(weights), group, 0)

    def gradients() -> dict[str, Tensor]:
        return {"gate": group.gate.grad[0], "A": group.lora_A.grad[0], "B": group.lora_B[0].grad}

    return Formulation(layer, list(group.parameters()), gradients, group.expert_parameters())


def expert_group() -> ExpertParallel:
    """One EP group of all ranks."""
    return expert_parallel(dist.get_world_size())
