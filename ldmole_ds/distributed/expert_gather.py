"""The other way round: the experts' weights come to the tokens, and their gradients go home.

One all-gather brings an input group's experts from all ranks of the EP group; backward is one reduce-scatter that sums
every rank's gradient at the expert's home. Between the micro-steps of one optimizer step the weights do not change, so
what was gathered can be kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ldmole_ds.distributed.all_to_all import Channel


class _GatherExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, channel, kept, *tensors):
        num_ranks = channel.size
        if kept is None:
            kept = gather_flat(tensors, channel)
        ctx.channel, ctx.shapes = channel, [t.shape for t in tensors]
        parts = kept.split([t.numel() for t in tensors], dim=1)
        return tuple(part.reshape(num_ranks, *t.shape) for part, t in zip(parts, tensors, strict=True))

    @staticmethod
    def backward(ctx, *grads):
        channel, num_ranks = ctx.channel, ctx.channel.size
        flat = torch.cat([g.reshape(num_ranks, -1) for g in grads], dim=1)
        out = flat.new_empty(flat.shape[1])
        channel.stats.add("reduce_scatter", num_ranks - 1, (num_ranks - 1) * out.numel() * out.element_size())
        with channel.guard("reduce_scatter"):
            channel.collectives.reduce_scatter(out, flat.view(-1))
        parts = out.split([shape.numel() for shape in ctx.shapes])
        return None, None, *(part.view(shape) for part, shape in zip(parts, ctx.shapes, strict=True))


@torch.no_grad()
def gather_flat(tensors: Sequence[Tensor], channel: Channel) -> Tensor:
    """All ranks' tensors, flattened one after another: ``(P, n)``. Collective over the EP group."""
    flat = torch.cat([t.reshape(-1) for t in tensors])
    gathered = flat.new_empty(channel.size, flat.numel())
    remote = channel.size - 1
    channel.stats.add("gather", remote, remote * flat.numel() * flat.element_size())
    with channel.guard("gather"):
        channel.collectives.all_gather(gathered.view(-1), flat)
    return gathered


def is_outdated(kept: Tensor, tensors: Sequence[Tensor], own_rank: int) -> Tensor:
    """Whether this rank's weights are no longer what was gathered, ``()`` bool. The other ranks must be asked, too."""
    parts = kept[own_rank].split([t.numel() for t in tensors])
    pairs = [(part, t.detach().reshape(-1)) for part, t in zip(parts, tensors, strict=True)]
    if kept.device.type == "cpu":
        return torch.tensor(not all(torch.equal(*pair) for pair in pairs))
    # The same without waiting for the device, once for each tensor.
    return torch.stack([(part != now).any() for part, now in pairs]).any()


def gather_experts(
    lora_A: Tensor, lora_B: Sequence[Tensor], channel: Channel, kept: Tensor | None = None
) -> tuple[Tensor, list[Tensor]]:
    """All experts of the group from the local ones: ``(G, e, r, D), G x (e, r, O_g) -> (G, E, r, D), G x (E, r, O_g)``.

    Args:
        lora_A, lora_B: This rank's experts.
        channel: Group, statistics and layer.
        kept: What `gather_flat` returned for the same weights; nothing is gathered then. Backward is the same.
    """
    all_A, *all_B = _GatherExperts.apply(channel, kept, lora_A, *lora_B)
    return all_A.transpose(0, 1).flatten(1, 2), [b.flatten(0, 1) for b in all_B]
