"""Finds which projections read the same tensor, by watching a copy of the model without weights.

A twin of the model is built on the meta device from its config and called once on two tokens; projections that receive
the same tensor object form an input group. Nothing is guessed from names, so Phi's and GPT-J's groups, which span
attention and MLP, are found as well. Where the twin stops half-way (a forward that depends on data), what was seen is
carried over to layers of the same shape of name; where it cannot be built, every projection stands alone.
"""

from __future__ import annotations

import copy
import logging
import re

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)


def _meta_twin(model: nn.Module) -> nn.Module:
    config = copy.deepcopy(model.config)
    config._attn_implementation = "eager"
    config._experts_implementation = "batched_mm"  # no shape in it depends on the data
    with torch.device("meta"):
        twin = type(model)(config)
    return twin.eval()


def _watch(twin: nn.Module, targets: list[str]) -> list[tuple[str, Tensor]]:
    """``(module name, input tensor)`` in call order; as far as the twin's forward gets. Warns of those never called."""
    seen: list[tuple[str, Tensor]] = []
    handles = []
    for name in targets:
        hook = lambda module, args, name=name: seen.append((name, args[0]))  # noqa: E731
        handles.append(twin.get_submodule(name).register_forward_pre_hook(hook))
    inputs = {"input_ids": torch.zeros(1, 2, dtype=torch.long, device="meta")}
    try:
        with torch.no_grad():
            twin(**inputs)
    except Exception as error:
        logger.info("the forward pass that looks for input groups stopped early (%s: %s)", type(error).__name__, error)
    else:
        called = {name for name, _ in seen}
        missed = [name for name in targets if name not in called]
        if missed:
            logger.warning(
                "%d of %d target modules are not called by %s on text, first %s: experts there train only if something "
                "else calls them. Name the modules to adapt with --target_modules",
                len(missed),
                len(targets),
                type(twin).__name__,
                missed[0],
            )
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _template(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def _layer_key(name: str) -> tuple[str, ...]:
    return tuple(re.findall(r"(?<=\.)\d+(?=\.)", name))


def group_by_input(seen: list[tuple[str, Tensor]]) -> list[list[str]]:
    """Names grouped by the identity of their first input, in call order."""
    groups: list[tuple[Tensor, list[str]]] = []
    done: set[str] = set()
    for name, x in seen:
        if name in done:
            continue
        done.add(name)
        for tensor, members in groups:
            if tensor is x:
                members.append(name)
                break
        else:
            groups.append((x, [name]))
    return [members for _, members in groups]


def find_input_groups(model: nn.Module, targets: dict[str, nn.Module], mode: str = "auto") -> list[list[str]]:
    """Groups of target names; every target is in exactly one.

    Args:
        model: A Hugging Face model (or any module; without a ``config`` every group has one member).
        targets: Full names and modules, from `find_targets`.
        mode: auto or single.
    """
    names = list(targets)
    if mode == "single":
        return [[name] for name in names]
    try:
        groups = group_by_input(_watch(_meta_twin(model), names))
    except Exception as error:
        logger.warning(
            "no input groups could be found for %s (%s: %s): every projection routes and dispatches on its own",
            type(model).__name__,
            type(error).__name__,
            error,
        )
        return [[name] for name in names]
    groups = [g for g in groups if len({targets[name].weight.device for name in g}) == 1] if groups else groups
    placed = {name for g in groups for name in g}
    templates = {tuple(_template(name) for name in g) for g in groups if len(g) > 1}
    for name in names:
        if name in placed:
            continue
        group = next((g for t in templates if (g := _instance(t, name, targets)) and not placed & set(g)), [name])
        groups.append(group)
        placed.update(group)
    return groups


def _instance(template: tuple[str, ...], first: str, targets: dict[str, nn.Module]) -> list[str] | None:
    """The group of this template whose first member is ``first``, if all its members are targets."""
    if _template(first) != template[0]:
        return None
    layer = _layer_key(first)
    members = [name for t in template for name in targets if _template(name) == t and _layer_key(name) == layer]
    return members if len(members) == len(template) else None


def group_name(members: list[str]) -> str:
    """``model.layers.0.self_attn.{q_proj,k_proj,v_proj}`` for three siblings, or the one full name."""
    if len(members) == 1:
        return members[0]
    split = [m.split(".") for m in members]
    depth = 0
    while all(len(s) > depth + 1 and s[depth] == split[0][depth] for s in split):
        depth += 1
    rests = ",".join(".".join(s[depth:]) for s in split)
    return ".".join([*split[0][:depth], "{" + rests + "}"])
