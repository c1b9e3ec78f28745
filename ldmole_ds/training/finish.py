"""The rest of a run, once everything is built: train, evaluate, save, report."""

from __future__ import annotations

import time
from pathlib import Path

from ldmole_ds.checkpoint import CheckpointError
from ldmole_ds.distributed.agreement import raise_together
from ldmole_ds.model import LDMoLEModel
from ldmole_ds.tasks import TASKS
from ldmole_ds.training import report as reports
from ldmole_ds.training.data import ChoiceData
from ldmole_ds.training.memory import MemoryOfTraining
from ldmole_ds.training.preemption import EXIT_PREEMPTED
from ldmole_ds.training.run_record import ANSWERS_NAME, write_json
from ldmole_ds.training.runtime import UserError, agreed, is_main_process
from ldmole_ds.training.sft import SFTData
from ldmole_ds.training.trainer import LDMoLETrainer


def finish(
    trainer: LDMoLETrainer,
    model: LDMoLEModel,
    data: ChoiceData | SFTData,
    folder: Path,
    resume: str | bool | None,
    memory: MemoryOfTraining,
) -> None:
    """Train, evaluate, save, report; or train until a signal says stop."""
    begin = time.perf_counter()
    try:
        result = trainer.train(resume_from_checkpoint=resume)
    except (CheckpointError, ImportError) as error:  # ImportError: a setting needs a package
        raise UserError(str(error)) from error
    if trainer.preemption.stopped_by:
        if is_main_process():
            step, signal = trainer.state.global_step, trainer.preemption.stopped_by
            place = folder / f"checkpoint-{step}"
            print(
                f"stopped by {signal} after step {step}, saved in {place}; the same command with --resume auto goes on "
                f"(exit code {EXIT_PREEMPTED})",
                flush=True,
            )
        return
    trainer.close_window()
    seconds = result.metrics.get("train_runtime", time.perf_counter() - begin)
    metrics = dict(result.metrics)
    evaluation: dict[str, float] = {}
    routing_rows: dict[str, dict] = {}
    with agreed("saving"):
        trainer.save_model()  # first: --bf16_full_eval casts the weights
    if data.validation is not None:
        evaluation = trainer.evaluate()
        routing_rows = trainer.eval_routing.summary(reduce=model.topology.world_size > 1)
    with agreed("saving"):
        trainer.save_metrics("train", metrics)
        if evaluation:
            trainer.save_metrics("eval", evaluation)
        trainer.save_state()
    ranks = reports.gather_rank_facts(model)
    history = trainer.state.log_history
    before = next((row for row in history if "eval_loss" in row and row["step"] == 0), {})
    report = {
        "steps": trainer.state.global_step,
        "seconds": seconds,
        "tokens_per_second": trainer.tokens_timed / max(trainer.train_seconds, 1e-9),
        "flops_per_token": trainer.operations / max(trainer.tokens_timed, 1),
        "training_memory_bytes": memory.bytes,
        "accuracy_before": before.get("eval_accuracy"),
        "accuracy_after": evaluation.get("eval_accuracy"),
        "accuracy_by_task": {
            name: evaluation[f"eval_accuracy_{name}"] for name in TASKS if f"eval_accuracy_{name}" in evaluation
        },
        "perplexity_before": before.get("eval_perplexity"),
        "perplexity_after": evaluation.get("eval_perplexity"),
        "eval_rows": len(data.validation) if data.validation else 0,
        "num_experts": model.adapter_config.num_experts,
        "routing": _mean_routing(routing_rows),
        "parameters": model.num_parameters_by_kind(),
        "ranks": ranks,
        "hint": reports.layout_hint(model),
        "adapter": str(folder),
        "next_command": _next_command(folder, data),
    }
    with raise_together(lambda reason: UserError(f"{folder} holds the adapter, but its report is not whole: {reason}")):
        if is_main_process():
            write_json(folder / "report.json", report)
            write_json(folder / "routing_summary.json", routing_rows)
            if isinstance(data, ChoiceData) and data.answers:
                write_json(folder / ANSWERS_NAME, data.answers)
            reports.plot_curves(history, folder / "curves.png")
            print(reports.format_report(report), flush=True)


def _mean_routing(rows: dict[str, dict]) -> dict[str, float]:
    """Means over projections of the held-out routing, for the report."""
    if not rows:
        return {}
    names = ("experts_per_token", "lambda_mean", "lambda_std", "max_load", "live_hidden_units", "hidden_units")
    values = {n: [r[n] for r in rows.values() if r.get(n) is not None] for n in names}
    return {n: round(sum(v) / len(v), 4) for n, v in values.items() if v}


def _next_command(folder: Path, data: ChoiceData | SFTData) -> str:
    """What to type next."""
    if isinstance(data, SFTData):
        return f'python launch/generate.py --adapter {folder} --chat --prompt "..."'
    if data.train[0].task and not data.label_words:
        return f"python launch/evaluate.py --adapter {folder}"
    kind = "--classify " if data.label_words else ""
    prompt = "my card was declined at the grocery store" if data.label_words else "Question: ..."
    return f'python launch/generate.py --adapter {folder} {kind}--prompt "{prompt}"'
