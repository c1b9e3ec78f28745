#!/usr/bin/env python
"""How many operations a GPU is started for in one decoder layer, forward and backward; counted, on any machine.

    pip install -e '.[bench]'
    python benchmarks/launches.py                    # without a GPU: half a minute

With few tokens a GPU computes faster than Python starts its operations, and then their number is what a step costs.
Every PyTorch operation that reads or writes values counts as one, and so does every launch of a Triton kernel; views
and allocations do not. The model is a Qwen3 or Llama of two widths and a few tokens, all seven projections adapted, in
bfloat16, without dropout: sizes do not change the number. A layer's are those of a model of three layers less those of
one layer, halved. Without a GPU Triton's kernels run in its interpreter, which counts as nothing.

Variants: PEFT's LoRA; ours as it is; ours with its parts in nodes of their own, as where tokens travel; without the
routing kernel (``LDMOLE_FUSED_ROUTING=off``); the authors' formulation.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported
sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import harness  # noqa: E402
import transformers  # noqa: E402
from authors_formulation import AuthorsModel  # noqa: E402
from step_models import PROJECTIONS, loss_of, wake  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config  # noqa: E402

from ldmole_ds import LDMoLEConfig, get_ldmole_model  # noqa: E402
from ldmole_ds.layers import input_group  # noqa: E402
from ldmole_ds.ops import group_kernel, group_product, routing_kernel, shared_input  # noqa: E402
from ldmole_ds.ops.fused_routing import SWITCH  # noqa: E402
from ldmole_ds.training.run_record import versions  # noqa: E402

LORA, OURS, APART, PLAIN, AUTHORS = (
    "PEFT LoRA",
    "ours",
    "ours, parts in nodes of their own",
    "ours, routing kernel off",
    "authors' formulation",
)
KERNELS = {
    group_kernel: ("group_forward_kernel", "group_backward_kernel"),
    routing_kernel: ("routing_forward_kernel", "routing_backward_kernel"),
}
_ALLOCATE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "detach"}
_SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1}
SHAPES: dict[str, Callable[[int], transformers.PretrainedConfig]] = {
    "qwen3": lambda layers: Qwen3Config(vocab_size=64, head_dim=16, num_hidden_layers=layers, **_SIZES),
    "llama": lambda layers: LlamaConfig(vocab_size=64, head_dim=16, num_hidden_layers=layers, **_SIZES),
}


class Launches(TorchDispatchMode):
    """Counts them by name; see the module docstring."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.in_kernel = False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        counts = not (self.in_kernel or function.is_view or name in _ALLOCATE or function.namespace == "prim")
        self.counts[name] += counts
        return function(*args, **(kwargs or {}))

    def as_one(self, name: str, function: Callable) -> Callable:
        """The function, each call of which counts as one of this name, whatever it does on a CPU."""

        def call(*args: object, **kwargs: object) -> object:
            self.counts[name] += 1
            self.in_kernel = True
            try:
                return function(*args, **kwargs)
            finally:
                self.in_kernel = False

        return call


class CountedKernel:
    """A Triton kernel, whose launches count as one each."""

    def __init__(self, kernel: object, launches: Launches) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple) -> Callable:
        return self.launches.as_one("a Triton kernel", self.kernel[grid])


@contextmanager
def _replaced(owner: object, name: str, value: object) -> Iterator[None]:
    kept = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, kept)


def build(args: argparse.Namespace, variant: str, shape: str, layers: int) -> nn.Module:
    torch.manual_seed(0)
    with torch.device(args.device):
        base = AutoModelForCausalLM.from_config(SHAPES[shape](layers), dtype=torch.bfloat16)
    if variant == LORA:
        from peft_peer import LoraConfig, get_peft_model

        config = LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules=PROJECTIONS, bias="none")
        return wake(get_peft_model(base, config, autocast_adapter_dtype=False))
    config = LDMoLEConfig(num_experts=args.experts, r=args.rank, lora_alpha=2 * args.rank, lora_dropout=0.0)
    model = wake(get_ldmole_model(base, config, 1))
    return AuthorsModel(model).train() if variant == AUTHORS else model


def count(args: argparse.Namespace, variant: str, shape: str, layers: int) -> tuple[Counter, Counter]:
    """Of a step: forward, backward."""
    os.environ[SWITCH] = "off" if variant in (PLAIN, AUTHORS) else "on"
    model, launches, found = build(args, variant, shape, layers), Launches(), []
    ids = torch.arange(8, device=args.device).view(1, 8)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    with ExitStack() as stack:
        for module, names in KERNELS.items():
            for name in names:
                stack.enter_context(_replaced(module, name, CountedKernel(getattr(module, name), launches)))
        for module in (group_product, shared_input):  # a CPU multiplies bfloat16 in other ways than a GPU
            product = launches.as_one("mm", module.exact_product)
            stack.enter_context(_replaced(module, "exact_product", product))
        if variant == APART:
            stack.enter_context(_replaced(input_group, "runs_whole", lambda *_: False))
        stack.enter_context(_replaced(shared_input, "_on_tensor_cores", lambda *_: True))
        stack.enter_context(launches)
        loss = loss_of(model, inputs)
        found.append(launches.counts.copy())
        loss.backward()
    return found[0], launches.counts - found[0]


def of_a_layer(args: argparse.Namespace, variant: str, shape: str) -> tuple[Counter, Counter]:
    """Forward and backward of one decoder layer."""
    one, three = count(args, variant, shape, 1), count(args, variant, shape, 3)
    layers = [Counter({k: (b[k] - a[k]) / 2 for k in b if b[k] != a[k]}) for a, b in zip(one, three, strict=True)]
    return layers[0], layers[1]


def report(args: argparse.Namespace, results: dict[str, dict[str, tuple[Counter, Counter]]]) -> str:
    from peft_peer import peft_version

    tables = []
    for shape, variants in results.items():
        rows = [["variant", "forward", "backward", "together", "of LoRA's", "matrix products", "Triton"]]
        base = sum(c.total() for c in variants[LORA])
        for variant, (forward, backward) in variants.items():
            both = forward + backward
            products = sum(n for name, n in both.items() if name in ("mm", "addmm", "addmm_", "bmm", "baddbmm"))
            numbers = (forward.total(), backward.total(), both.total())
            triton = f"{both['a Triton kernel']:g}"
            rows.append([variant, *(f"{n:g}" for n in numbers), f"{both.total() / base:.2f}", f"{products:g}", triton])
        tables += [f"## {shape}", harness.table(rows)]
    found = ", ".join(f"{k} {v}" for k, v in {**versions(), "peft": peft_version}.items() if v != "not installed")
    return "\n\n".join(
        [
            "# Operations of one decoder layer, forward and backward",
            "Counted, not timed: what a GPU is started for, " + f"E {args.experts}, r {args.rank}, bfloat16, seven "
            f"projections, no dropout, on {args.device}. Reproduce: `python benchmarks/launches.py`.",
            f"{harness.machine()}. {found}.",
            *tables,
            "",
        ]
    )


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    add("--variants", nargs="+", default=[LORA, OURS, APART, PLAIN, AUTHORS], help="PEFT LoRA must be one of them")
    add("--experts", type=int, default=8, help="E")
    add("--rank", type=int, default=8, help="r of an expert, and of PEFT LoRA")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    add("--output", type=Path, help="folder of launches.md and launches.json [benchmarks/results]")
    args = parser.parse_args(argv)
    if LORA not in args.variants:
        parser.error(f"--variants must name {LORA!r}, which the others are compared with")
    return args


def main() -> None:
    args = parse(sys.argv[1:])
    transformers.logging.set_verbosity_error()
    results = {shape: {v: of_a_layer(args, v, shape) for v in args.variants} for shape in args.shapes}
    values = {"setting": vars(args) | {"output": None}, "machine": harness.machine(), "versions": versions()}
    values["results"] = {
        shape: {v: [dict(c) for c in found] for v, found in variants.items()} for shape, variants in results.items()
    }
    harness.write("launches", report(args, results), values, args.output)


if __name__ == "__main__":
    main()
