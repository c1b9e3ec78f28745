#!/usr/bin/env python
"""One training step (forward and backward) in one process: LD-MoLE against the frozen base, plain LoRA and the authors.

    pip install -e '.[bench]'                                         # PEFT
    OMP_NUM_THREADS=2 python benchmarks/step.py                       # CPU, float32
    python benchmarks/step.py --device cuda --dtype bfloat16 --tokens 8192

A Qwen3 of random weights, all seven projections adapted. Variants: the frozen base (its input embeddings ask for a
gradient, so that backward runs), PEFT LoRA of rank r and of rank E * r (as many expert parameters as ours), LD-MoLE as
the authors compute it and in its kindest reading (first checked to give our loss and gradients), and ours; a second
part has dropout and a wider lambda MLP. Where ours multiplies by another library than PyTorch's choice
(`ldmole_ds.ops.matrix_products`), a further variant does not. Each variant takes its turn in every round of one
process. Peak memory is that of a process per variant, above the loaded model: see `harness.PeakMemory`.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

import harness  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from peft_peer import peft_version  # noqa: E402
from step_models import AUTHORS, LORA, LORA_WIDE, OURS, batch, check_equal, models, step_of  # noqa: E402

from ldmole_ds.training.run_record import git_revision, versions  # noqa: E402

# Limits of ours in units of a peer: (time, memory).
BARS = {LORA: (1.25, 1.15), LORA_WIDE: (1.0, None), AUTHORS: (0.45, None)}
DROPOUT_BARS = {LORA: (1.35, None)}


def measure_memory(args: argparse.Namespace) -> dict[str, float]:
    """In a process of one variant: peak of three steps above the loaded model, MB."""
    model, inputs = models(args, *args.part)[args.variant](), batch(args)
    step = step_of(model, inputs, args.variant)
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
    steps = {name: step_of(make(), inputs, name) for name, make in models(args, *part).items()}
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
    found = ", ".join(f"{k} {v}" for k, v in {**versions(), "peft": peft_version}.items() if v != "not installed")
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
