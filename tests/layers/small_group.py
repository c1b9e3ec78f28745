"""A small input group whose dispatcher keeps what it was asked to do. D in_features, E experts, R rank."""

import torch

from ldmole_ds.distributed import ExpertParallel, LocalTokenDispatcher
from ldmole_ds.layers import AdaptedLinear, ForwardContext, InputGroup, LambdaMLP, build_router
from ldmole_ds.layers.context import ContextHolder

D, E, R = 6, 4, 2
OUT = [5, 3, 3]


class Watched(LocalTokenDispatcher):
    """Keeps what it was asked to dispatch."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def run(self, x_TD, probs_TGE, experts, layer):
        self.calls.append((x_TD, probs_TGE))
        return super().run(x_TD, probs_TGE, experts, layer)


def make_group(members=("q", "k", "v"), out=None, awake=True, **changes):
    values = {
        "name": "layer",
        "members": list(members),
        "in_features": D,
        "out_features": list(out or OUT[: len(members)]),
        "num_experts": E,
        "r": R,
        "scaling": 2.0,
        "dropout": 0.0,
        "router": build_router("sparsegen"),
        "lambda_mlp": LambdaMLP(D, 4, generator=torch.Generator().manual_seed(1)),
        "owns_lambda_mlp": True,
        "topology": ExpertParallel(),
        "dispatcher": Watched(),
        "holder": ContextHolder(),
        "mask_padding": True,
        "seed": 3,
        "dtype": torch.float32,
        "device": "cpu",
    }
    group = InputGroup(**{**values, **changes})
    with torch.no_grad():
        for b in group.lora_B if awake else ():
            b.normal_()
    return group


def projections(group):
    linears = [torch.nn.Linear(D, out, bias=False).requires_grad_(False) for out in group.out_features]
    return [AdaptedLinear(linear, group, i) for i, linear in enumerate(linears)]


def one_pass(group, x, mask=None):
    """Outputs of all members, gradients, and the record."""
    x, context = x.clone().requires_grad_(), ForwardContext(padding_mask=mask)
    torch.manual_seed(1)  # of dropout
    with group.holder.use(context):
        outputs = [layer(x) for layer in group.layers]
    group.zero_grad()
    weights = [torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.device) for y in outputs]
    (record,) = context.records
    sum((y * w).sum() for y, w in zip(outputs, weights, strict=True)).add(record.sums.square().sum()).backward()
    grads = {name: p.grad.clone() for name, p in group.named_parameters() if p.grad is not None}
    return outputs, {**grads, "x": x.grad}, record
