"""Base models that are mixtures of experts themselves: what of them gets no LoRA experts, and why.

Transformers 5 holds the experts of such a base as fused three-dimensional weights, which no linear layer computes.
Where they are a list of modules instead, each is called for some tokens only: a rank whose tokens all go elsewhere
would stay out of the exchange that its peers have entered. The base's own routers decide which of its frozen experts a
token meets; they are left as they were trained unless they are named. None of this is silent.
"""

from __future__ import annotations

import re

from torch import nn

from ldmole_ds.distributed.zero import full_shape

# Path components of routers and of the gates of shared experts, inside a mixture-of-experts block.
_ROUTERS = {"gate", "router", "wg", "shared_expert_gate"}


def expert_holders(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that hold the base's own experts, fused or as a list, by full name."""
    return {name: module for name, module in model.named_modules() if _is_fused(module) or _is_list(name, module)}


def _is_fused(module: nn.Module) -> bool:
    if isinstance(module, nn.modules.conv._ConvNd):
        return False
    shapes = [full_shape(p) for p in module.parameters(recurse=False)]
    return any(len(shape) == 3 and shape[0] > 1 for shape in shapes)


def _is_list(name: str, module: nn.Module) -> bool:
    return name.rsplit(".", 1)[-1] == "experts" and isinstance(module, (nn.ModuleList, nn.ModuleDict))


def is_inside(name: str, holders: dict[str, nn.Module]) -> bool:
    """Whether the module is, or is part of, one of the base's own experts."""
    return any(name == holder or name.startswith(holder + ".") for holder in holders)


def is_router(name: str, holders: dict[str, nn.Module]) -> bool:
    """Whether the module decides, beside experts, where tokens go or how much of a shared expert they get."""
    blocks = {holder.rpartition(".")[0] + "." for holder in holders}
    return any(name.startswith(block) and _ROUTERS & set(name[len(block) :].split(".")) for block in blocks)


def left_out(model: nn.Module, expected: set[int]) -> list[str]:
    """What ``all-linear`` does not adapt, one phrase for each kind of module with a weight matrix.

    Args:
        model: The base model, before any layer is replaced.
        expected: Ids of the modules that need no word: targets, the head, ``modules_to_save`` and all inside them.
    """
    holders = expert_holders(model)
    counts: dict[tuple[str, str, str], tuple[int, int]] = {}
    for name, module in model.named_modules():
        shapes = [full_shape(p) for p in module.parameters(recurse=False)]
        numel = sum(shape.numel() for shape in shapes if len(shape) > 1)
        if not numel or id(module) in expected or isinstance(module, nn.Embedding):
            continue
        if is_router(name, holders):
            reason = "the base's own router"
        elif is_inside(name, holders):
            reason = "fused experts" if _is_fused(module) else "called for some tokens only"
        elif isinstance(module, nn.Linear):
            reason = "a head, frozen: modules_to_save trains it"
        else:
            reason = "no linear layer"
        name = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)
        key = (name, type(module).__name__, reason)
        modules, total = counts.get(key, (0, 0))
        counts[key] = (modules + 1, total + numel)
    return [
        f"{name} ({modules} {kind} with {total:,} parameters: {reason})"
        for (name, kind, reason), (modules, total) in counts.items()
    ]
