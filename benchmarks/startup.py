#!/usr/bin/env python
"""From typing the command to the first training step, on a tiny model, where nothing but start-up takes time.

    python benchmarks/startup.py

Each way of starting takes its turn in every round: alone and by the DeepSpeed launcher on two ranks, with the folders
of compiled extensions as they are (warm) and empty. A first round, not counted, fills the disk cache. Marks are the
times at which the run prints the ranks it found (imports and communication are up), its settings (data and model are
there), and the first step's loss.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

import harness  # noqa: E402

from ldmole_ds.training.run_record import versions  # noqa: E402

BAR_S = 12.0
MARKS = {"ranks": ", accelerator ", "settings": "batch     ", "first step": "'loss'"}


def tiny_model(folder: Path) -> None:
    """Hidden 32, two layers, random weights, with the tokenizer of the embedded model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from ldmole_ds.model.base_model import load_tokenizer
    from ldmole_ds.tasks import demo_model_file

    tokenizer = load_tokenizer(str(demo_model_file()))
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads, vocab_size=len(tokenizer))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def command(way: str, model: Path, output: Path, port: int) -> list[str]:
    train = [str(ROOT / "launch" / "train.py")]
    if way == "one process":
        start = [sys.executable, *train]
    else:
        launcher = str(Path(sys.executable).with_name("deepspeed"))
        start = [launcher, "--num_gpus", "2", "--master_port", str(port), *train]
        start += ["--deepspeed", str(ROOT / "ds_configs" / "zero2.json")]
    flags = ["--model_name_or_path", model, "--output_dir", output, "--max_steps", 2, "--logging_steps", 1]
    flags += ["--eval_strategy", "no", "--eval_on_start", "False", "--max_eval_samples", 8]
    return [*start, *map(str, flags)]


def marks_of(words: list[str], extensions: Path | None) -> dict[str, float]:
    """Seconds until each mark is printed.

    Raises:
        RuntimeError: The run failed, or printed no loss.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    if extensions is not None:
        environment |= dict.fromkeys(("TORCH_EXTENSIONS_DIR", "XDG_CACHE_HOME"), str(extensions))
    begin, found, output = time.perf_counter(), {}, []
    process = subprocess.Popen(
        words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    for line in process.stdout:
        output.append(line)
        for mark, text in MARKS.items():
            if mark not in found and text in line:
                found[mark] = time.perf_counter() - begin
    if process.wait() or len(found) < len(MARKS):
        raise RuntimeError(f"{' '.join(words)} did not train:\n{''.join(output)[-3000:]}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--port", type=int, default=29631, help="Of the DeepSpeed launcher.")
    args = parser.parse_args()
    ways = [(way, cache) for way in ("one process", "deepspeed, 2 ranks") for cache in ("warm", "empty")]
    times: dict[tuple[str, str], list[dict[str, float]]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch) / "model"
        tiny_model(model)
        for i in range(args.rounds + 1):
            for way in ways:
                folder = Path(tempfile.mkdtemp(dir=scratch))
                extensions = folder / "extensions" if way[1] == "empty" else None
                found = marks_of(command(way[0], model, folder / "out", args.port), extensions)
                if i:
                    times[way].append(found)
    rows = [["start", "extension cache", *(f"{mark}, s" for mark in MARKS), "fastest, slowest", f"bar {BAR_S:g} s"]]
    values = []
    for (way, cache), runs in times.items():
        medians = {mark: statistics.median(run[mark] for run in runs) for mark in MARKS}
        last = [run["first step"] for run in runs]
        held = "held" if medians["first step"] < BAR_S else "MISSED"
        rows.append([way, cache, *(f"{v:.1f}" for v in medians.values()), f"{min(last):.1f}, {max(last):.1f}", held])
        values.append({"start": way, "extension_cache": cache, "seconds": runs})
    setting = f"Tiny Llama (hidden 32, two layers), one thread a rank; medians of {args.rounds} interleaved rounds."
    versions_text = ", ".join(f"{k} {v}" for k, v in versions().items())
    markdown = (
        "# From command to first step\n\n"
        f"{setting} Reproduce: `python benchmarks/startup.py`.\n\n{harness.table(rows)}\n\n"
        f"{harness.machine()}. Versions: {versions_text}.\n"
    )
    harness.write("startup", markdown, {"machine": harness.machine(), "runs": values})


if __name__ == "__main__":
    main()
