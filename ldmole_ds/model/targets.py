"""Which modules of a Hugging Face model get experts."""

from __future__ import annotations

import re

from torch import nn
from transformers.pytorch_utils import Conv1D

from ldmole_ds.distributed.zero import full_shape


def linear_features(module: nn.Module) -> tuple[int, int]:
    """``(in_features, out_features)`` of an `nn.Linear` or GPT-2's `Conv1D`, also quantised, or held by ZeRO-3."""
    if isinstance(module, Conv1D):
        in_features, out_features = full_shape(module.weight)
        return in_features, out_features
    return module.in_features, module.out_features


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, Conv1D)) and getattr(module, "weight", None) is not None


def _head_modules(model: nn.Module) -> set[int]:
    """The output layer, and the classification heads Hugging Face adds: they are trained in full or not at all."""
    heads = {id(getattr(model, name)) for name in ("score", "classifier", "qa_outputs") if hasattr(model, name)}
    get_output = getattr(model, "get_output_embeddings", None)
    output = get_output() if callable(get_output) else None
    return heads | ({id(output)} if output is not None else set())


def candidate_modules(model: nn.Module, modules_to_save: list[str] | None = None) -> dict[str, nn.Module]:
    """Every linear layer that may be adapted, by full name, in the model's order."""
    heads = _head_modules(model)
    skip = tuple(modules_to_save or ())

    def inside_saved(name: str) -> bool:
        return any(name == s or name.startswith(s + ".") or name.endswith("." + s) or f".{s}." in name for s in skip)

    return {
        name: module
        for name, module in model.named_modules()
        if _is_linear(module) and id(module) not in heads and not inside_saved(name)
    }


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
        found = candidates
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
