"""The adapter on disk: one canonical form, keyed by projection and global expert, whatever the layout.

``adapter_model.safetensors`` holds, per adapted projection ``<path>``:

    <path>.lora_A (E, r, D)      <path>.lora_B (E, O, r)      <path>.router (E, D)
    lambda_mlp.<key>.{weight_in, bias_in, weight_out, bias_out}      modules_to_save under their own names
    adaptive_l1.exponent      router relu: where the control of its L1 loss stands

``<key>`` is the input width (shared) or the input group's name (per layer).
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ldmole_ds.checkpoint import TrainingState, has_training_state, problem_of
from ldmole_ds.config import CONFIG_NAME, WEIGHTS_NAME
from ldmole_ds.distributed import ExpertParallel
from ldmole_ds.distributed.zero import finish_prefetches, full_shape, gathered
from ldmole_ds.model.adapter_checks import check_values
from ldmole_ds.model.canonical import L1_EXPONENT, adapter_state, canonical_shapes, lambda_mlps, saved_modules
from ldmole_ds.model.quantized import num_weights

if TYPE_CHECKING:
    from ldmole_ds.layers import InputGroup
    from ldmole_ds.model.ldmole_model import LDMoLEModel


def _all_experts(value: Tensor, group: InputGroup, dim: int) -> Tensor:
    """All experts of a partitioned tensor, in global order. Collective over the EP group."""
    if not group.partitioned:
        return value
    parts = [torch.empty_like(value) for _ in range(group.topology.ep_size)]
    dist.all_gather(parts, value, group=group.topology.ep_group)
    return torch.cat(parts, dim)


@torch.no_grad()
def gather_adapter_state(model: LDMoLEModel, *, keep: bool = True) -> dict[str, Tensor]:
    """The canonical state on the CPU. Collective: every rank calls it.

    Args:
        model: Under any layout and ZeRO stage.
        keep: Whether this rank wants the tensors (others take part and return nothing).
    """
    finish_prefetches(model)
    state: dict[str, Tensor] = {}

    def put(key: str, value: Tensor) -> None:
        if keep:
            state[key] = value.detach().to("cpu", copy=True).contiguous()

    for group in model.input_groups:
        with gathered(group.parameters()):
            lora_A = _all_experts(group.lora_A.detach().clone(), group, 1)
            lora_B = [_all_experts(b.detach().clone(), group, 0) for b in group.lora_B]
            for g, path in enumerate(group.members):
                put(f"{path}.lora_A", lora_A[g])
                put(f"{path}.lora_B", lora_B[g].transpose(1, 2))
                if group.gate is not None:
                    put(f"{path}.router", group.gate[g])
    for key, mlp in lambda_mlps(model).items():
        with gathered(mlp.parameters()):
            for name, param in mlp.named_parameters():
                put(f"lambda_mlp.{key}.{name}", param)
    for name, param in saved_modules(model).items():
        with gathered([param]):
            put(name, param)
    if model.adaptive_l1 is not None:
        put(L1_EXPONENT, model.adaptive_l1.exponent)
    return state


def save_adapter(model: LDMoLEModel, folder: Path) -> None:
    """Gather on all ranks, write on rank 0, each file beside its final name and then renamed. Collective.

    Raises:
        OSError: the folder cannot be written; raised on every rank, so that none waits for the writer.
    """
    writer = model.topology.rank == 0
    state = gather_adapter_state(model, keep=writer)
    error: str | None = None
    if writer:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            config = json.dumps(model.adapter_config.to_dict(), indent=2) + "\n"
            write_atomically(folder / WEIGHTS_NAME, lambda path: save_file(state, path, metadata={"format": "pt"}))
            write_atomically(folder / CONFIG_NAME, lambda path: path.write_text(config, encoding="utf-8"))
        except (OSError, SafetensorError) as caught:  # a full disk is the latter
            error = f"the adapter could not be saved in {folder}: {caught}"
    raise_on_all_ranks(model.topology, error)


def raise_on_all_ranks(topology: ExpertParallel, error: str | None) -> None:
    """Raise rank 0's ``error``, if it has one, as an `OSError` on every rank. Collective."""
    if topology.world_size > 1:
        box = [error]
        dist.broadcast_object_list(box, src=0)
        error = box[0]
    if error:
        raise OSError(error)


def write_atomically(path: Path, write) -> None:
    """Call ``write(temporary path)`` beside ``path``, flush it to disk, and rename it to ``path``."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_state(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, with a clear error for a missing or damaged one."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: give the folder that holds {CONFIG_NAME} and {WEIGHTS_NAME}")
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}
    except SafetensorError as error:
        raise ValueError(
            f"{path} is damaged or not a safetensors file ({error}): restore it from a good copy"
        ) from error


def read_adapter(folder: Path) -> dict[str, Tensor]:
    """The adapter of an adapter's or a checkpoint's folder, on the CPU. Safetensors only: no pickle is ever opened.

    A checkpoint gives its float32 weights, after its files are compared with their manifest.

    Raises:
        FileNotFoundError: The folder holds no adapter weights.
        ValueError: A file is damaged, or a tensor is empty, not floating point, or not finite.
        CheckpointError: The checkpoint contradicts itself.
    """
    if has_training_state(folder):
        problem = problem_of(folder)
        if problem:
            raise ValueError(f"{folder} is damaged: {problem}; use another checkpoint")
        state = adapter_state(TrainingState(folder))
        check_values(state, folder)
        return state
    path = folder / WEIGHTS_NAME
    if not path.is_file() and (folder / "adapter_model.bin").is_file():
        raise FileNotFoundError(
            f"{folder} holds adapter_model.bin, which is a pickle and is never read, but no {WEIGHTS_NAME}: save the "
            "adapter again with save_pretrained, or have someone who trusts the file convert it"
        )
    state = read_state(path)
    check_values(state, path)
    return state


def expected_shapes(model: LDMoLEModel) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of the adapter file; needs no weights and no collective."""
    shapes = canonical_shapes(model)
    for key in [key for key in shapes if key.endswith(".lora_B")]:
        experts, r, out_features = shapes[key]
        shapes[key] = (experts, out_features, r)
    if model.adaptive_l1 is not None:
        shapes[L1_EXPONENT] = ()
    return shapes


def _check_state(model: LDMoLEModel, state: dict[str, Tensor], source: str) -> None:
    """Refuse a state that does not fit before anything is copied: a refused adapter leaves the model as it was."""
    expected = expected_shapes(model)
    for key, shape in expected.items():
        if key not in state:
            raise ValueError(f"{source} lacks {key}: it was written for another adapter configuration")
        if tuple(state[key].shape) != shape:
            raise ValueError(f"{source}: {key} has shape {tuple(state[key].shape)}, expected {shape}")
    unknown = sorted(state.keys() - expected.keys())
    if unknown:
        raise ValueError(f"{source} holds tensors this model has no place for: {unknown[:4]}")


@torch.no_grad()
def load_state(model: LDMoLEModel, state: dict[str, Tensor], source: str) -> None:
    """Load a canonical state into a model of any layout; each rank takes its own experts. Collective under ZeRO-3.

    Raises:
        ValueError: Tensors are missing, unknown or of another shape; the model is as it was.
    """
    _check_state(model, state, source)
    finish_prefetches(model)
    for group in model.input_groups:
        experts = group.topology.local_experts(group.num_experts)
        held = slice(experts.start, experts.stop)
        with gathered(group.parameters(), modifier_rank=0):
            for g, path in enumerate(group.members):
                group.lora_A.data[g].copy_(state[f"{path}.lora_A"][held])
                group.lora_B[g].data.copy_(state[f"{path}.lora_B"][held].transpose(1, 2))
                if group.gate is not None:
                    group.gate.data[g].copy_(state[f"{path}.router"])
    for key, mlp in lambda_mlps(model).items():
        with gathered(mlp.parameters(), modifier_rank=0):
            for name, param in mlp.named_parameters():
                param.data.copy_(state[f"lambda_mlp.{key}.{name}"])
    for name, param in saved_modules(model).items():
        with gathered([param], modifier_rank=0):
            param.data.copy_(state[name])
    if model.adaptive_l1 is not None:
        model.adaptive_l1.exponent.copy_(state[L1_EXPONENT])


def count_parameters(model: LDMoLEModel) -> dict[str, int]:
    """``{"trainable", "trainable_on_this_rank", "base"}``; trainable counts every expert once, over all ranks."""
    local = total = base = 0
    expert_ids = {id(p): g.topology.ep_size for g in model.input_groups if g.partitioned for p in g.expert_parameters()}
    for param in model.parameters():
        numel = full_shape(param).numel()
        if param.requires_grad:
            local += numel
            total += numel * expert_ids.get(id(param), 1)
        else:
            base += num_weights(param)
    return {"trainable": total, "trainable_on_this_rank": local, "base": base}
