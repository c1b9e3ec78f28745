#!/usr/bin/env python
"""One training step on one GPU at the paper's model sizes: LD-MoLE against plain LoRA and the authors' formulation.

    python benchmarks/gpu_step.py                                       # one H100 or H200: about a quarter of an hour
    python benchmarks/gpu_step.py --shapes qwen3-1.7b --tokens 4096

Qwen3-1.7B and Llama-3.2-3B by shape, with random weights (nothing is downloaded), all seven projections adapted, bf16
throughout, dropout 0.1, E 8 and r 8 as in the paper. A step is forward, backward and AdamW on the adapter. Each variant
runs in processes of its own, so that one's memory is not another's; they take turns, the second time in reverse order.
A variant that does not fit says so. Beforehand ours and the authors' are checked to be equal on a small model.

`benchmarks/step.py` has more variants at small sizes, for a CPU.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

import harness  # noqa: E402
import step as small_step  # noqa: E402
import step_models  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from gpu_step_models import AUTHORS, LORA, OURS, PLAIN, SHAPES, build  # noqa: E402
from peft_peer import peft_version  # noqa: E402

from ldmole_ds.ops.fused_routing import SWITCH, uses_fused_routing  # noqa: E402
from ldmole_ds.training.flops import peak_tflops_of  # noqa: E402
from ldmole_ds.training.run_record import git_revision, versions  # noqa: E402

VARIANTS = (LORA, AUTHORS, PLAIN, OURS)
# Time of ours in units of a peer's, at most.
BARS = {LORA: 1.15, AUTHORS: 0.25}


def measure(args: argparse.Namespace) -> dict:
    """In a process of one variant: seconds of each step, memory, operations."""
    os.environ[SWITCH] = "off" if args.variant == PLAIN else "auto"
    (shape,), (tokens,) = args.shapes, args.tokens
    rows = (tokens // args.sequence, args.sequence)
    ids = torch.randint(SHAPES[shape]().vocab_size, rows, generator=torch.Generator().manual_seed(2)).to(args.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    model, flops, used = build(args, shape, inputs)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=1e-5, fused=args.device == "cuda")

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        step_models.loss_of(model, inputs).backward()
        optimizer.step()

    with harness.PeakMemory() as memory:
        seconds = harness.interleaved({"it": step}, args.rounds, args.warmup)["it"]
    kernel = args.variant == OURS and uses_fused_routing(torch.zeros((), device=args.device))
    above, total = memory.bytes / 2**30, memory.total / 2**30
    return {"seconds": seconds, "above_GB": above, "total_GB": total, "flops": flops, "used": used, "kernel": kernel}


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether the device has no memory left: torch finds that, or a library or driver that allocates by itself."""
    own = isinstance(error, torch.OutOfMemoryError)
    return own or any(text in str(error) for text in ("out of memory", "ALLOC_FAILED"))


def run_variant(argv: list[str], shape: str, tokens: int, variant: str) -> dict | None:
    """`measure` in its own process; None where memory runs out."""
    flags = ["--shapes", shape, "--tokens", str(tokens), "--variant", variant]
    print(f"{shape}, {tokens} tokens: {variant} ...", file=sys.stderr, flush=True)
    found = harness.in_own_process(Path(__file__), *argv, *flags)
    return None if found.get("out_of_memory") else found


def run_setting(args: argparse.Namespace, argv: list[str], shape: str, tokens: int) -> dict:
    """Every variant of one model and number of tokens."""
    found: dict[str, dict | None] = {}
    for variant in (*VARIANTS, *reversed(VARIANTS)) if args.repeats > 1 else VARIANTS:
        if variant in found and found[variant] is None:
            continue
        result, earlier = run_variant(argv, shape, tokens, variant), found.get(variant)
        if earlier is not None and result is not None:
            result["seconds"] = earlier["seconds"] + result["seconds"]
        found[variant] = result
    return found


def setting_table(args: argparse.Namespace, found: dict, peak: float | None) -> str:
    head = ["variant", "step ms: median (quartiles)", "ours / it", "bar", "peak above model GB", "peak in all GB"]
    rows = [[*head, "MFU", "experts per token"]]
    mine = found[OURS]
    for name in VARIANTS:
        result, label = found[name], f"{name} {args.rank}" if name == LORA else name
        if result is None:
            rows.append([label, "out of memory", *[""] * 6])
            continue
        middle, low, high = harness.spread(result["seconds"])
        relative = "" if name == OURS or mine is None else f"{harness.spread(mine['seconds'])[0] / middle:.3f}"
        rows.append(
            [
                label,
                f"{1e3 * middle:.1f} ({1e3 * low:.1f} to {1e3 * high:.1f})",
                relative,
                f"{BARS[name]:g}" if name in BARS else "",
                f"{result['above_GB']:.2f}",
                f"{result['total_GB']:.2f}",
                f"{result['flops'] / middle / peak / 1e12:.3f}" if peak else "",
                f"{result['used']:.2f}",
            ]
        )
    return harness.table(rows)


def report(args: argparse.Namespace, results: dict, equality: dict[str, float], peak: float | None) -> str:
    found = ", ".join(f"{k} {v}" for k, v in {**versions(), "peft": peft_version}.items() if v != "not installed")
    kernel = any(setting[OURS] and setting[OURS]["kernel"] for setting in results.values())
    rated = (
        f"MFU of {peak:g} TFLOPS, by the mathematics' operations." if peak else "No MFU: the device's peak is unknown."
    )
    tables = [
        text for title, setting in results.items() for text in (f"## {title}", setting_table(args, setting, peak))
    ]
    return "\n\n".join(
        [
            "# One training step at the paper's model sizes",
            f"Random weights; sequences of {args.sequence}; E {args.experts}, r {args.rank}, dropout {args.dropout}, "
            f"lambda hidden {args.lambda_hidden}; {args.dtype} on {args.device}; forward, backward and AdamW; "
            f"{args.rounds * args.repeats} steps of each variant. Reproduce: `python benchmarks/gpu_step.py`.",
            f"{harness.machine()}. {found}. Routing kernel: {'used' if kernel else 'not used'}. {rated}",
            *tables,
            f"On a small float32 model the authors' formulation equals ours: loss within {equality['loss']:.1e}, "
            f"gradients within {equality['gradients']:.1e} (norm-wise, worst tensor).",
            "",
        ]
    )


def check_equal(args: argparse.Namespace) -> dict[str, float]:
    """Ours, with the kernel on a GPU, against the authors' formulation, on a small float32 model."""
    sizes = "--layers 2 --hidden 96 --intermediate 128 --heads 3 --kv_heads 1 --head_dim 32 --vocab 128 --tokens 128"
    return step_models.check_equal(small_step.parse([*sizes.split(), "--sequence", "64", "--device", args.device]))


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shapes", nargs="+", default=["qwen3-1.7b", "llama-3.2-3b"], choices=list(SHAPES), help="models, by size")
    add("--tokens", nargs="+", type=int, default=[2048, 8192], help="tokens of a step; the authors' may fit few only")
    add("--sequence", type=int, default=1024, help="tokens of a sequence")
    add("--device", default="cuda", choices=["cuda", "cpu"])
    add("--dtype", default="bfloat16", choices=["float32", "bfloat16"], help="of base model and adapters alike")
    add("--experts", type=int, default=8, help="E")
    add("--rank", type=int, default=8, help="r of an expert, and of PEFT LoRA")
    add("--dropout", type=float, default=0.1)
    add("--lambda_hidden", type=int, default=256, help="hidden units of the lambda MLP")
    add("--rounds", type=int, default=20, help="timed steps of a process")
    add("--warmup", type=int, default=5, help="steps before them")
    add("--repeats", type=int, default=2, choices=[1, 2], help="processes of a variant")
    add("--peak_tflops", type=float, help="of the device, for MFU, where the name of the card does not tell")
    add("--output", type=Path, help="folder of gpu_step.md and gpu_step.json [benchmarks/results]")
    add("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no GPU here: run on one, or try the script with --device cpu --shapes tiny")
    for tokens in args.tokens:
        if tokens < 1 or tokens % args.sequence:
            parser.error(f"--tokens {tokens} is no multiple of --sequence {args.sequence}")
    return args


def main() -> None:
    argv = sys.argv[1:]
    args = parse(argv)
    transformers.logging.set_verbosity_error()
    if args.variant:
        try:
            print(json.dumps(measure(args)))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            print(json.dumps({"out_of_memory": True}))
        return
    peak = args.peak_tflops or (peak_tflops_of(torch.cuda.get_device_name()) if args.device == "cuda" else None)
    results: dict[str, dict] = {}
    values = {
        "setting": vars(args) | {"output": None},
        "machine": harness.machine(),
        "versions": versions(),
        "git_revision": git_revision(),
        "equality": check_equal(args),
        "results": results,
    }
    for shape, tokens in itertools.product(args.shapes, args.tokens):
        results[f"{shape}, {tokens} tokens"] = run_setting(args, argv, shape, tokens)
        # What is measured is kept, whatever comes after.
        harness.write("gpu_step", report(args, results, values["equality"], peak), values, args.output)


if __name__ == "__main__":
    main()
