"""Loads adapters written by the LD-MoLE authors' code into our canonical form.

Their keys, where ``<path>`` is the adapted linear layer and i counts experts:

    base_model.model.<path>.lora_A{i}.weight (r, D)     .lora_B{i}.weight (O, r)     .lora_route.weight (E, D)
    base_model.model.<path>.sparsegen.mlp.proj_layers.<D>.{0,2}.{weight,bias}

The lambda MLP is one shared module per input width, repeated under every layer.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ldmole_ds.model import adapter_io
from ldmole_ds.model.adapter_checks import check_values

if TYPE_CHECKING:
    from ldmole_ds.model.ldmole_model import LDMoLEModel

_PREFIX = "base_model.model."
_MLP_NAMES = {"0.weight": "weight_in", "0.bias": "bias_in", "2.weight": "weight_out", "2.bias": "bias_out"}


def convert_reference_state(model: LDMoLEModel, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The authors' keys renamed and stacked to the canonical form of ``model``.

    Raises:
        ValueError: a tensor is missing, an expert or router has no place, or copies of the shared lambda MLP differ.
    """
    state = {key.removeprefix(_PREFIX): value for key, value in state.items()}
    converted: dict[str, Tensor] = {}
    unused = {key for key in state if ".lora_" in key}

    def get(key: str) -> Tensor:
        if key not in state:
            raise ValueError(f"the reference adapter lacks {key}: num_experts, target_modules or base model differ")
        unused.discard(key)
        return state[key]

    for group in model.input_groups:
        for path in group.members:
            for side in ("lora_A", "lora_B"):
                stacked = [get(f"{path}.{side}{i}.weight") for i in range(group.num_experts)]
                converted[f"{path}.{side}"] = torch.stack(stacked)
            if group.gate is not None:
                converted[f"{path}.router"] = get(f"{path}.lora_route.weight")
            if group.lambda_mlp is None:
                continue
            key = str(group.in_features) if model.lambda_mlps else group.name
            for theirs, ours in _MLP_NAMES.items():
                value = get(f"{path}.sparsegen.mlp.proj_layers.{group.in_features}.{theirs}")
                known = converted.setdefault(f"lambda_mlp.{key}.{ours}", value)
                if not torch.equal(known, value):
                    raise ValueError(
                        f"the reference adapter's lambda MLP differs under {path}: it was trained with local MLPs, use "
                        "lambda_sharing='per_layer' and input_groups='single'"
                    )
    if unused:
        raise ValueError(
            f"the reference adapter holds {sorted(unused)[:4]}, for which this model has no place: num_experts, "
            "target_modules or base model differ"
        )
    return converted


def load_reference_adapter(model: LDMoLEModel, state_dict_or_path: dict[str, Tensor] | str | Path) -> None:
    """Load weights written by the authors' code: a state dict, a ``.safetensors`` file, or a pickled ``.bin`` file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged, holds anything but finite tensors, or does not fit the model.
    """
    source = "the reference adapter"
    state = state_dict_or_path
    if not isinstance(state, dict):
        path = Path(state)
        source = str(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not a file: give the .safetensors or .bin file the authors' code wrote")
        state = adapter_io.read_state(path) if path.suffix == ".safetensors" else _read_pickled(path)
    converted = convert_reference_state(model, state)
    check_values(converted, source)
    adapter_io.load_state(model, converted, source=source)


def _read_pickled(path: Path) -> dict[str, Tensor]:
    """A file of `torch.save`, with ``weights_only=True`` alone: whatever else is pickled in it is never built."""
    remedy = "restore it from a good copy, or have it converted to a .safetensors file by someone who trusts it"
    with open(path, "rb") as file:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except MemoryError:
            raise
        except Exception:
            # Damaged bytes raise errors of many types. Torch's own advice is to unpickle everything: not passed on.
            raise ValueError(
                f"{path} is damaged or pickles more than tensors, which is never loaded: {remedy}"
            ) from None
    is_dict = isinstance(state, dict)
    if not is_dict or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise ValueError(f"{path} holds no state dict (a dict of names and tensors) but something else: {remedy}")
    return state
