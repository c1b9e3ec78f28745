#!/usr/bin/env python
"""One training step (forward and backward) in one process: LD-MoLE against the frozen base, plain LoRA and the authors.

    OMP_NUM_THREADS=2 python benchmarks/step.py                       # CPU, float32
    python benchmarks/step.py --device cuda --dtype bfloat16 --tokens 8192

A Qwen3 of random weights, all seven projections adapted. Variants: the frozen base (its input embeddings ask for a
gradient, so that backward runs), PEFT LoRA of rank r and of rank E * r (as many expert parameters as ours), LD-MoLE as
the authors formulate it (first checked to give our loss and gradients), and ours; a second part has dropout and a wider
lambda MLP. Each variant takes its turn in every round of one process. Peak memory is that of a process per variant,
above the loaded model: see `harness.PeakMemory`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

import harness  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from authors_formulation import AuthorsModel  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from torch import nn  # noqa: E402
from transformers import Qwen3Config, Qwen3ForCausalLM  # noqa: E402

from ldmole_ds import LDMoLEConfig, get_ldmole_model  # noqa: E402
from ldmole_ds.training.run_record import git_revision, versions  # noqa: E402

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FROZEN, LORA, LORA_WIDE, AUTHORS, OURS = "frozen base", "PEFT LoRA r", "PEFT LoRA E*r", "authors' formulation", "ours"
# Limits of ours in units of a peer: (time, memory).
BARS = {LORA: (1.25, 1.15), LORA_WIDE: (1.0, None), AUTHORS: (0.45, None)}
DROPOUT_BARS = {LORA: (1.35, None)}


def base_model(args: argparse.Namespace) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        head_dim=args.head_dim,
        tie_word_embeddings=True,
    )
    with torch.device(args.device):
        return Qwen3ForCausalLM(config).to(getattr(torch, args.dtype))


def lora(args: argparse.Namespace, r: int, dropout: float) -> nn.Module:
    config = LoraConfig(r=r, lora_alpha=2 * r, lora_dropout=dropout, target_modules=PROJECTIONS, bias="none")
    return wake(get_peft_model(base_model(args), config, autocast_adapter_dtype=False))


def ours(args: argparse.Namespace, dropout: float, lambda_hidden: int) -> nn.Module:
    config = LDMoLEConfig(
        num_experts=args.experts,
        r=args.rank,
        lora_alpha=2 * args.rank,
        lora_dropout=dropout,
        lambda_hidden_size=lambda_hidden,
        sparsity_loss_weight=args.sparsity_loss_weight,
    )
    return wake(get_ldmole_model(base_model(args), config, 1))


def wake(model: nn.Module) -> nn.Module:
    """LoRA B starts at zero; values of a trained size make every gradient count."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "lora_B" in name:
                param.normal_(std=0.02)
    return model.train()


def models(args: argparse.Namespace, dropout: float, lambda_hidden: int) -> dict[str, Callable[[], nn.Module]]:
    """How to make each variant."""
    return {
        FROZEN: lambda: base_model(args).requires_grad_(False).train(),
        LORA: lambda: lora(args, args.rank, dropout),
        LORA_WIDE: lambda: lora(args, args.rank * args.experts, dropout),
        AUTHORS: lambda: AuthorsModel(ours(args, dropout, lambda_hidden)).train(),
        OURS: lambda: ours(args, dropout, lambda_hidden),
    }


def batch(args: argparse.Namespace) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    shape = (args.tokens // args.sequence, args.sequence)
    ids = torch.randint(args.vocab, shape, generator=generator).to(args.device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def loss_of(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    if isinstance(model, AuthorsModel):
        return model(**inputs)
    if isinstance(model, Qwen3ForCausalLM):
        embeds = model.get_input_embeddings()(inputs["input_ids"]).requires_grad_()
        mask, labels = inputs["attention_mask"], inputs["labels"]
        return model(inputs_embeds=embeds, attention_mask=mask, labels=labels, use_cache=False).loss
    return model(**inputs, use_cache=False).loss


def step_of(model: nn.Module, inputs: dict[str, torch.Tensor]) -> Callable[[], None]:
    params = [p for p in model.parameters() if p.requires_grad]

    def step() -> None:
        for param in params:
            param.grad = None
        loss_of(model, inputs).backward()

    return step


def check_equal(args: argparse.Namespace) -> dict[str, float]:
    """Loss and gradients of the authors' formulation are ours: the largest relative differences.

    Raises:
        AssertionError: They are not.
    """
    mine, peer, inputs = ours(args, 0.0, 64), AuthorsModel(ours(args, 0.0, 64)).train(), batch(args)
    losses = [loss_of(model, inputs) for model in (mine, peer)]
    for loss in losses:
        loss.backward()
    layers, worst = iter(peer.layers), 0.0
    for group in mine.input_groups:
        # The groups' members come in the order of the model, and so do the peer's layers.
        for i in range(len(group.members)):
            layer = next(layers)
            pairs = [(group.gate.grad[i], layer.gate), (group.lora_A.grad[i], layer.lora_A)]
            for grad, param in [*pairs, (group.lora_B[i].grad, layer.lora_B)]:
                worst = max(worst, ((grad - param.grad).norm() / param.grad.norm()).item())
    for width, mlp in mine.lambda_mlps.items():
        first, _, last = peer.mlps[width]
        for grad, param in ((mlp.weight_in.grad, first.weight), (mlp.bias_out.grad, last.bias)):
            worst = max(worst, ((grad - param.grad).norm() / param.grad.norm()).item())
    difference = abs(losses[0].item() / losses[1].item() - 1)
    limit = 1e-3 if args.dtype == "float32" else 0.1
    assert difference < limit and worst < limit, f"ours and the authors' differ: loss {difference}, gradients {worst}"
    return {"loss": difference, "gradients": worst}


def measure_memory(args: argparse.Namespace) -> dict[str, float]:
    """In a process of one variant: peak of three steps above the loaded model, MB."""
    model, inputs = models(args, *args.part)[args.variant](), batch(args)
    step = step_of(model, inputs)
    with harness.PeakMemory() as memory:
        for _ in range(3):
            step()
        harness.synchronize()
    return {"above_model_MB": memory.bytes / 2**20, "total_MB": memory.total / 2**20}


def run_part(args: argparse.Namespace, argv: list[str], part: tuple[float, int]) -> dict:
    """Time and memory of every variant for one dropout and lambda hidden size."""
    memory = {}
    for name in models(args, *part):
        flags = ["--variant", name, "--part", *map(str, part)]
        runs = [harness.in_own_process(Path(__file__), *argv, *flags) for _ in range(args.memory_runs)]
        memory[name] = sorted(runs, key=lambda run: run["above_model_MB"])[len(runs) // 2]
    inputs = batch(args)
    steps = {name: step_of(make(), inputs) for name, make in models(args, *part).items()}
    return {"memory": memory, "seconds": harness.interleaved(steps, args.rounds, args.warmup)}


def part_table(args: argparse.Namespace, result: dict, bars: dict) -> str:
    seconds, memory = result["seconds"], result["memory"]
    names = {LORA: f"PEFT LoRA r {args.rank}", LORA_WIDE: f"PEFT LoRA r {args.rank * args.experts}"}
    head = ["variant", "step ms: median (quartiles)", "ours / it", "bar"]
    rows = [[*head, "peak above model MB", "ours / it", "bar", "peak in all MB"]]
    for name, values in seconds.items():
        middle, low, high = (1e3 * v for v in harness.spread(values))
        time_bar, memory_bar = bars.get(name, (None, None))
        relative, above = harness.ratio(seconds, OURS, name), memory[name]["above_model_MB"]
        rows.append(
            [
                names.get(name, name),
                f"{middle:.0f} ({low:.0f} to {high:.0f})",
                "" if name == OURS else f"{relative[0]:.3f} ({relative[1]:.3f} to {relative[2]:.3f})",
                f"{time_bar:g}" if time_bar else "",
                f"{above:.0f}",
                "" if name == OURS else f"{memory[OURS]['above_model_MB'] / above:.2f}",
                f"{memory_bar:g}" if memory_bar else "",
                f"{memory[name]['total_MB']:.0f}",
            ]
        )
    return harness.table(rows)


def report(args: argparse.Namespace, results: dict, equality: dict[str, float]) -> str:
    import peft

    found = ", ".join(f"{k} {v}" for k, v in {**versions(), "peft": peft.__version__}.items() if v != "not installed")
    setting = (
        f"Qwen3 of {args.layers} layers, hidden {args.hidden}, intermediate {args.intermediate}, heads {args.heads} x "
        f"{args.head_dim} ({args.kv_heads} for keys and values), vocabulary {args.vocab}; {args.tokens} tokens in "
        f"sequences of {args.sequence}; E {args.experts}, r {args.rank}; {args.dtype} on {args.device}; forward and "
        f"backward with all auxiliary losses; {args.rounds} rounds."
    )
    parts = []
    for title, result, bars in results.values():
        parts += [f"## {title}", part_table(args, result, bars)]
    return "\n\n".join(
        [
            "# One training step in one process",
            f"{setting} Reproduce: `OMP_NUM_THREADS={torch.get_num_threads()} python benchmarks/step.py`.",
            f"{harness.machine()}. {found}.",
            "Ratios are medians over rounds of the ratio within a round. Peak memory: one process per variant, "
            "high-water mark of three steps above the loaded model (weights and libraries not counted; gradients are).",
            *parts,
            f"The authors' formulation equals ours: loss within {equality['loss']:.1e}, gradients within "
            f"{equality['gradients']:.1e} (norm-wise, worst tensor).",
            "",
        ]
    )


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", default="cpu", help="cpu or cuda")
    add("--dtype", default="float32", choices=["float32", "bfloat16"], help="of base model and adapters alike")
    add("--layers", type=int, default=6)
    add("--hidden", type=int, default=576)
    add("--intermediate", type=int, default=1536)
    add("--heads", type=int, default=9)
    add("--kv_heads", type=int, default=3)
    add("--head_dim", type=int, default=64)
    add("--vocab", type=int, default=1024, help="small, so that the head hides nothing of an adapter's cost")
    add("--tokens", type=int, default=512, help="tokens of a step")
    add("--sequence", type=int, default=128, help="tokens of a sequence")
    add("--experts", type=int, default=8, help="E")
    add("--rank", type=int, default=8, help="r of an expert, and of the smaller PEFT LoRA")
    add("--sparsity_loss_weight", type=float, default=0.0)
    add("--rounds", type=int, default=15, help="timed rounds, each with every variant once")
    add("--warmup", type=int, default=3, help="rounds before them")
    add("--memory_runs", type=int, default=3, help="processes per variant for the peak memory; the median counts")
    add("--parts", nargs="+", default=["plain", "dropout"], choices=["plain", "dropout"])
    add("--output", type=Path, default=None, help="folder of step.md and step.json [benchmarks/results]")
    add("--variant", help=argparse.SUPPRESS)
    add("--part", type=float, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.part:
        args.part = (args.part[0], int(args.part[1]))
    return args


def main() -> None:
    argv = sys.argv[1:]
    args = parse(argv)
    transformers.logging.set_verbosity_error()
    if args.variant:
        print(json.dumps(measure_memory(args)))
        return
    equality = check_equal(args)
    titles = {
        "plain": ("No dropout, lambda hidden 64", (0.0, 64), BARS),
        "dropout": ("Dropout 0.1, lambda hidden 256", (0.1, 256), DROPOUT_BARS),
    }
    results = {name: (titles[name][0], run_part(args, argv, titles[name][1]), titles[name][2]) for name in args.parts}
    values = {
        "setting": vars(args) | {"output": None},
        "machine": harness.machine(),
        "versions": versions(),
        "git_revision": git_revision(),
        "equality": equality,
        "results": {name: result for name, (_, result, _) in results.items()},
    }
    harness.write("step", report(args, results, equality), values, args.output)


if __name__ == "__main__":
    main()
