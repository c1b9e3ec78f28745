"""Which modules of a Hugging Face model get experts."""

from __future__ import annotations

import re

from torch import nn
from transformers.pytorch_utils import Conv1D

from ldmole_ds.distributed.zero import full_shape
from ldmole_ds.model.moe_base import expert_holders, is_inside, is_router, left_out


def linear_features(module: nn.Module) -> tuple[int, int]:
    """``(in_features, out_features)`` of an `nn.Linear` or GPT-2's `Conv1D`, also quantised, or held by ZeRO-3."""
    if isinstance(module, Conv1D):
        in_features, out_features = full_shape(module.weight)
        return in_features, out_features
    return module.in_features, module.out_features


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, Conv1D)) and getattr(module, "weight", None) is not None


def _output_layer(model: nn.Module) -> set[int]:
    get_output = getattr(model, "get_output_embeddings", None)
    output = get_output() if callable(get_output) else None
    return set() if output is None else {id(output)}


def _classification_heads(model: nn.Module) -> set[int]:
    """The heads Hugging Face adds to a model: they are trained in full (``modules_to_save``) or not at all."""
    return {id(getattr(model, name)) for name in ("score", "classifier", "qa_outputs") if hasattr(model, name)}


def _saved_modules(model: nn.Module, modules_to_save: list[str] | None) -> set[int]:
    """The modules that are trained in full, with all that is inside them."""
    saved = tuple(modules_to_save or ())

    def inside(name: str) -> bool:
        return any(name == s or name.startswith(s + ".") or name.endswith("." + s) or f".{s}." in name for s in saved)

    return {id(module) for name, module in model.named_modules() if inside(name)}


def candidate_modules(model: nn.Module, modules_to_save: list[str] | None = None) -> dict[str, nn.Module]:
    """Every linear layer that may be adapted, by full name, in the model's order."""
    never = _output_layer(model) | _classification_heads(model) | _saved_modules(model, modules_to_save)
    holders = expert_holders(model)
    return {
        name: module
        for name, module in model.named_modules()
        if _is_linear(module) and id(module) not in never and not is_inside(name, holders)
    }


def left_out_modules(
    model: nn.Module, targets: dict[str, nn.Module], modules_to_save: list[str] | None = None
) -> list[str]:
    """What else has a weight matrix and is neither adapted nor trained, in words; see `moe_base.left_out`."""
    expected = {id(module) for module in targets.values()}
    return left_out(model, expected | _output_layer(model) | _saved_modules(model, modules_to_save))


def find_targets(
    model: nn.Module, target_modules: str | list[str], modules_to_save: list[str] | None = None
) -> dict[str, nn.Module]:
    """The linear layers that ``target_modules`` names.

    Raises:
        ValueError: nothing matches, a listed name matches nothing, or a regular expression is malformed.
    """
    candidates = candidate_modules(model, modules_to_save)
    endings = sorted({name.rsplit(".", 1)[-1] for name in candidates})
    choose = f"choose among {endings}, or use 'all-linear'"
    if target_modules == "all-linear":
        holders = expert_holders(model)
        found = {name: module for name, module in candidates.items() if not is_router(name, holders)}
    elif isinstance(target_modules, str):
        try:
            pattern = re.compile(target_modules)
        except re.error as error:
            raise ValueError(f"target_modules={target_modules!r} is not a regular expression ({error})") from error
        found = {name: m for name, m in candidates.items() if pattern.fullmatch(name)}
        if not found and target_modules in endings:
            raise ValueError(
                f"target_modules={target_modules!r} is one string, so it is matched as a regular expression against "
                f"full names and matches none: write it as a list, [{target_modules!r}]"
            )
    else:
        missing = [t for t in target_modules if not any(n == t or n.endswith("." + t) for n in candidates)]
        if missing:
            raise ValueError(f"target_modules {missing} match no linear layer of the base model: {choose}")
        found = {n: m for n, m in candidates.items() if any(n == t or n.endswith("." + t) for t in target_modules)}
    if not found:
        raise ValueError(f"target_modules={target_modules!r} matches no linear layer of the base model: {choose}")
    return found
