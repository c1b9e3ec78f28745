"""What training logs say: known answers, the same on all ranks, in files that a resume does not spoil."""

import csv
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ldmole_ds import get_ldmole_model
from ldmole_ds.training.flops import TrainingFlops, peak_tflops_of
from ldmole_ds.training.live_metrics import count_tokens
from ldmole_ds.training.metrics_file import METRICS_COLUMNS, PER_LAYER_COLUMNS, MetricsFileCallback, StepTable
from tests.distributed_utils import run_distributed
from tests.tiny import ragged_batch, tiny_config, tiny_llama, tiny_model
from tests.training.small_trainer import Rows
from tests.training.small_trainer import make_trainer as one_process
from tests.training.trainer_runs import make_trainer

ROUTING = {
    "experts_per_token", "max_load", "max_rank_load", "dead_experts", "lambda_mean", "lambda_std",
    "dispatch_bytes_per_step", "tokens_per_second",
}  # fmt: skip


def train_logs(trainer):
    return [row for row in trainer.state.log_history if "grad_norm" in row]


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


# ---- operations ----


def test_frozen_operations_are_those_that_torch_counts():
    """Forward and backward of the frozen model, every input's gradient computed: nothing but the count is shared."""
    base, ids = tiny_llama(), torch.arange(12).view(2, 6)
    base.requires_grad_(False)
    embedded = base.get_input_embeddings()(ids).requires_grad_()
    with FlopCounterMode(display=False) as counter:
        base(inputs_embeds=embedded).logits.sum().backward()
    flops = TrainingFlops(get_ldmole_model(base, tiny_config()))
    # Eager attention computes all pairs, masked ones included.
    want = flops.per_token * 12 + flops.per_answer * 12 + flops.per_pair * 2 * 6 * 6
    assert counter.get_total_flops() == want
    assert flops.per_answer == 4 * 128 * 64


def test_experts_cost_what_is_used():
    flops = TrainingFlops(tiny_model(tiny_config(num_experts=8, r=4, lambda_hidden_size=16)))
    group = next(g for g in tiny_model().input_groups if len(g.members) == 3)
    q = group.members[0]
    base = flops.of(10, 0, 0, {})
    row = {"experts_per_token": 2.5}
    extra = flops.of(10, 0, 0, {q: row}) - base
    # Without a record the one expert of plain LoRA is counted: 1.5 more are used here, and the router is.
    assert extra == 10 * (1.5 * 6 * 4 * (64 + 64) + 6 * 8 * 64)


@pytest.mark.parametrize(
    ("name", "peak"),
    [("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A10G", 70),
     ("NVIDIA L40S", 362), ("NVIDIA L4", 121), ("Some Card", None)],
)  # fmt: skip
def test_peaks_by_name(name, peak):
    assert peak_tflops_of(name) == peak


def test_tokens_and_pairs_are_counted_by_document():
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    labels = torch.tensor([[-100, -100, 5, 5], [-100, -100, -100, 7]])
    batch = {"input_ids": mask, "attention_mask": mask, "labels": labels}
    assert count_tokens(batch).tolist() == [7, 8, 3, 6 + 10]
    packed = {"input_ids": mask[1:], "position_ids": torch.tensor([[0, 1, 0, 1]])}
    assert count_tokens(packed).tolist() == [4, 4, 4, 3 + 3]


# ---- in the Trainer ----


def test_logs_of_one_process(tmp_path):
    model = tiny_model()
    trainer = one_process(model, Rows(ragged_batch(rows=8)), tmp_path, max_steps=2)
    trainer.train()
    for row in train_logs(trainer):
        assert row.keys() >= ROUTING and "mfu" not in row
        assert row["max_rank_load"] == 1.0 and row["dispatch_bytes_per_step"] == 0
        assert row["max_load"] >= 1.0 and row["dead_experts"] >= 1  # the first group's idle expert
        assert all(math.isfinite(value) for value in row.values())


def test_mfu_is_operations_over_time_and_peak(tmp_path):
    trainer = one_process(tiny_model(), Rows(ragged_batch(rows=8)), tmp_path)
    from ldmole_ds.training.live_metrics import LogWindow

    trainer.log_window = LogWindow(trainer.model, 0, peak_tflops=1e-3)
    done = []
    of = trainer.log_window.flops.of
    trainer.log_window.flops.of = lambda *args: done.append((args, of(*args))) or done[-1][1]
    trainer.train()
    (row,) = train_logs(trainer)
    (tokens, answers, pairs, _), operations = done[0]
    want = operations / (tokens / row["tokens_per_second"]) / 1e9
    assert row["mfu"] == pytest.approx(want, rel=1e-3) and 0 < answers <= tokens < pairs


def test_routers_without_lambda_log_none(tmp_path):
    for router in ("topk", "lora"):
        model = tiny_model(tiny_config(router=router))
        trainer = one_process(model, Rows(ragged_batch(rows=4)), tmp_path)
        trainer.train()
        (row,) = train_logs(trainer)
        assert "lambda_mean" not in row and ("experts_per_token" in row) == (router == "topk")


# ---- on ranks ----


def logs_on_ranks(rank, world_size, folder):
    """Per ep_size: logs, what this rank sent and computed, and the files' rows."""
    import os

    from accelerate import PartialState
    from accelerate.state import AcceleratorState

    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    PartialState(backend="gloo")
    results = {}
    for ep_size in (1, 2):
        AcceleratorState._reset_state()
        config = {
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "zero_optimization": {"stage": 2},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        place = f"{folder}/{ep_size}"
        evaluations = {"eval_dataset": Rows(ragged_batch(rows=4, seed=2)), "eval_strategy": "steps", "eval_steps": 1}
        trainer = make_trainer(2, 2, config, ep_size, output_dir=place, **evaluations)
        trainer.add_callback(MetricsFileCallback(trainer, per_layer=True))
        reductions = count_reductions(trainer)
        active = watch_activations(trainer.model)
        trainer.train()
        results[ep_size] = {
            "logs": train_logs(trainer),
            "reductions": reductions,
            "active": active,
            "sent": trainer.model.comm_stats.total_bytes,
        }
    return results


def count_reductions(trainer):
    """How many all-reduces each log makes."""
    import torch.distributed as dist

    counts, inside, original, metrics = [], [], dist.all_reduce, trainer.log_window.metrics

    def counted(*args, **kwargs):
        inside.append(1)
        return original(*args, **kwargs)

    def watched(step):
        inside.clear()
        dist.all_reduce = counted
        try:
            return metrics(step)
        finally:
            dist.all_reduce = original
            counts.append(len(inside))

    trainer.log_window.metrics = watched
    return counts


def watch_activations(model):
    """Activations of this rank's tokens in training, by the half of the experts they use."""
    counts = torch.zeros(2, dtype=torch.double)
    add = model.routing.add

    def watched(batches, records):
        if model.training:
            for record in records:
                used = (record.probs_TGE > 0) & record.mask_T.view(-1, 1, 1)
                counts.add_(used.sum((0, 1)).view(2, -1).sum(-1))
        add(batches, records)

    model.routing.add = watched
    return counts


@pytest.mark.distributed
def test_logs_of_ranks_agree_and_reduce_once(tmp_path):
    first, second = run_distributed(logs_on_ranks, 2, str(tmp_path), deepspeed=True, timeout_s=200)
    for ep_size in (1, 2):
        logs = first[ep_size]["logs"]
        assert logs == second[ep_size]["logs"] and len(logs) == 3
        assert first[ep_size]["reductions"] == [1, 1, 1]
        home, other = first[ep_size]["active"], second[ep_size]["active"]
        by_rank = (home + other).tolist() if ep_size == 2 else [home.sum(), other.sum()]
        mean = sum(row["max_rank_load"] for row in logs) / 3
        assert mean == pytest.approx(float(max(by_rank) * 2 / sum(by_rank)), abs=0.05)
        # The files: a row a step, the evaluation in the row of its step; every projection in the other one.
        rows = read(tmp_path / str(ep_size) / "metrics.csv")
        assert [row["step"] for row in rows] == ["1", "2", "3"] and tuple(rows[0]) == METRICS_COLUMNS
        assert [float(row["loss"]) for row in rows] == [row["loss"] for row in logs]
        assert all(row["eval_loss"] and row["mfu"] == "" for row in rows)
        layers = read(tmp_path / str(ep_size) / "metrics_per_layer.csv")
        assert len(layers) == 3 * 14 and tuple(layers[0]) == PER_LAYER_COLUMNS
        mean = sum(float(row["experts_per_token"]) for row in layers[:14]) / 14
        assert mean == pytest.approx(logs[0]["experts_per_token"], abs=1e-3)
    assert all(row["dispatch_bytes_per_step"] == 0 for row in first[1]["logs"])
    # Evaluation sends too, and is not in the logs.
    sent = sum(row["dispatch_bytes_per_step"] for row in first[2]["logs"])
    assert 0 < sent < first[2]["sent"] + second[2]["sent"]


# ---- files ----


def test_a_resumed_run_goes_on_in_its_files(tmp_path):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "output_dir": str(tmp_path)}
    curves = []
    for resume in (None, str(tmp_path / "checkpoint-2"), None):
        trainer = make_trainer(2, 1, None, 1, **settings)
        trainer.add_callback(MetricsFileCallback(trainer))
        trainer.train(resume_from_checkpoint=resume)
        rows = read(tmp_path / "metrics.csv")
        assert [row["step"] for row in rows] == ["1", "2", "3", "4"]
        curves.append([row["loss"] for row in rows])
        # What a run wrote after its last checkpoint, before it was killed in the middle of a line.
        with open(tmp_path / "metrics.csv", "a") as file:
            file.write("5,0.3,1.0\n6,")
    assert curves[0] == curves[1] == curves[2]
    assert not (tmp_path / "metrics_per_layer.csv").exists()


def test_a_table_keeps_its_columns(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("loss,step,gone\n0.5,1,x\n0.4,2,y\n")
    table = StepTable(path, ("step", "loss", "new"))
    table.resume(1)
    table.write(2, [{"loss": 0.3, "other": 9}])
    table.write(2, [{"new": 7}], merge=True)
    table.write(3, [{"loss": 0.1}])
    assert path.read_text() == "step,loss,new\n1,0.5,\n2,0.3,7\n3,0.1,\n"
