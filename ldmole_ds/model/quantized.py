"""Bases quantised by bitsandbytes: which layers they are, and what training needs of them.

`Linear4bit` (QLoRA, arXiv 2305.14314) and `Linear8bitLt` (LLM.int8(), arXiv 2208.07339) are frozen linear layers whose
weight is packed bytes or int8; products, and gradients with respect to the input, use the weight dequantised. They are
told by the class of their weight, so that nothing here needs the package.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ldmole_ds.distributed.zero import full_shape

_WEIGHT_CLASSES = ("Params4bit", "Int8Params")


def is_quantized(module: nn.Module) -> bool:
    """Whether the module's weight is one of bitsandbytes."""
    return type(getattr(module, "weight", None)).__name__ in _WEIGHT_CLASSES


def has_quantized_layers(model: nn.Module) -> bool:
    """Whether any layer of the model is quantised."""
    return any(is_quantized(module) for module in model.modules())


def layer_dtype(module: nn.Module, base_model: nn.Module) -> torch.dtype:
    """The dtype of adapters beside ``module``: its weight's, or the one in which a quantised layer computes.

    A `Linear4bit` may name it; else it is that of the model's parameters that are not quantised.
    """
    if not is_quantized(module):
        return module.weight.dtype
    named = getattr(module, "compute_dtype", None)
    return named or next((p.dtype for p in base_model.parameters() if p.is_floating_point()), torch.float32)


def num_weights(param: nn.Parameter) -> int:
    """Weights that a frozen parameter stands for, also while ZeRO-3 holds it: two per byte of a packed 4-bit one."""
    quant_state = getattr(param, "quant_state", None)
    return (full_shape(param) if quant_state is None else quant_state.shape).numel()


def prepare_quantized_layers(model: nn.Module) -> None:
    """Keep every quantised linear layer differentiable after an evaluation, on every processor.

    On CPUs with AVX512-BF16 a `Linear4bit` repacks its weight at its first evaluation, for a bfloat16 kernel that has
    no backward: training would go on without the gradient through that layer, adapted or not. So it is switched off.

    Raises:
        ValueError: A layer is repacked already, or holds floating point values, which DeepSpeed's mixed precision would
            cast.
    """
    for name, module in model.named_modules():
        if not (is_quantized(module) and isinstance(module, nn.Linear)):
            continue
        if module.weight.is_floating_point():
            raise ValueError(
                f"{name} ({type(module).__name__}) stores {module.weight.dtype} values, which the engine would cast: "
                "load the base through from_pretrained, with BitsAndBytesConfig's bnb_4bit_quant_storage and "
                "llm_int8_has_fp16_weight left at their defaults"
            )
        if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
            raise ValueError(
                f"{name} was repacked for inference when the bare base model was evaluated, and has no gradient in "
                "that form: load the base anew, and add the adapter before its first forward pass"
            )
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def drop_quantization_state(model: nn.Module, state: dict[str, Tensor], prefix: str, metadata: dict) -> None:
    """A ``state_dict`` hook that leaves out the scales of quantised layers.

    They belong to the frozen base, `load_state_dict` cannot load them, and DeepSpeed's checkpoints would hold them.
    """
    tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    known = {f"{prefix}{name}" for name, _ in tensors}
    for key in [key for key in state if key.startswith(prefix) and key not in known]:
        del state[key]
