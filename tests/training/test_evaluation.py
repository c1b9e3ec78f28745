"""evaluate() and predict(): whole logits for metrics; ranks with unequal rows under partitioned experts."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers.trainer_pt_utils import AcceleratorConfig

from ldmole_ds.model.adapter_io import load_state
from ldmole_ds.training.checks import check_trainable
from ldmole_ds.training.trainer import LDMoLETrainer
from tests.distributed_utils import run_distributed
from tests.tiny import ragged_batch, tiny_model
from tests.training import small_trainer
from tests.training.trainer_runs import make_trainer

# Seven rows in batches of two on two ranks: four rows here, three there.
EVAL_ROWS, EVAL_BATCH = 7, 2


def eval_rows() -> list[dict]:
    batch = ragged_batch(rows=EVAL_ROWS, seed=9)
    return [{key: value[i] for key, value in batch.items()} for i in range(EVAL_ROWS)]


def stacked(rows: list[dict]) -> dict:
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def logits_of(model) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(**stacked(eval_rows())).logits.numpy()


def test_metrics_get_the_logits_of_every_position(tmp_path):
    """The labels start late in every row; training needs no logits before them, metrics do."""
    model = tiny_model()
    trainer = small_trainer.make_trainer(model, small_trainer.Rows(ragged_batch(rows=8)), tmp_path)
    prediction = trainer.predict(eval_rows())
    assert prediction.label_ids.shape == prediction.predictions.shape[:2]
    np.testing.assert_allclose(prediction.predictions, logits_of(model), atol=1e-5)


def evaluate_on_ranks(rank: int, world_size: int, stages: list[int]) -> list[dict]:
    import os

    from accelerate import PartialState
    from accelerate.state import AcceleratorState

    from ldmole_ds.model.adapter_io import gather_adapter_state

    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    PartialState(backend="gloo")
    results = []
    for stage in stages:
        AcceleratorState._reset_state()
        config = {
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
        }
        changes = {"per_device_eval_batch_size": EVAL_BATCH, "eval_strategy": "steps", "eval_steps": 1}
        trainer = make_trainer(4, 1, config, world_size, eval_dataset=eval_rows(), **changes)
        trainer.train()  # evaluates after each step
        results.append(
            {
                "logged": [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row],
                "evaluated": trainer.evaluate()["eval_loss"],
                "predicted": trainer.predict(eval_rows()).predictions,
                "state": gather_adapter_state(trainer.model),
            }
        )
    return results


@pytest.mark.distributed
def test_ranks_with_unequal_rows_evaluate_as_one_process():
    of_ranks = run_distributed(evaluate_on_ranks, 2, [2, 3], deepspeed=True, timeout_s=300)
    for results in of_ranks:
        for result in results:
            model = tiny_model()
            load_state(model, result["state"], "the ranks")
            expected = logits_of(model)
            rows = stacked(eval_rows())
            lengths = rows["attention_mask"].sum(1).tolist()
            for i, length in enumerate(lengths):
                # Batches are as wide as their longest row; the last one has the first row to fill up.
                width = max(length, lengths[(i ^ 1) % EVAL_ROWS])
                found = result["predicted"][i, width - length : width]
                np.testing.assert_allclose(found, expected[i, -length:], atol=1e-5 * np.abs(expected).max())
            with torch.no_grad():
                losses = [model(**{k: v[i : i + 1] for k, v in rows.items()}).loss.item() for i in range(EVAL_ROWS)]
            losses[-1] = (losses[-1] + losses[0]) / 2
            assert result["evaluated"] == pytest.approx(np.mean(losses), rel=1e-5)
            assert len(result["logged"]) == 3 and result["logged"][-1] == pytest.approx(result["evaluated"], rel=1e-6)


def check(partitioned: bool, **settings) -> None:
    model = SimpleNamespace(
        input_groups=[SimpleNamespace(partitioned=partitioned)], adapter_config=SimpleNamespace(adapter_dtype=None)
    )
    plain = {
        "bf16": False,
        "fp16": False,
        "torch_compile": False,
        "should_log": False,
        "average_tokens_across_devices": True,
        "world_size": 2,
        "accelerator_config": AcceleratorConfig(),
    }
    check_trainable(model, SimpleNamespace(**{**plain, **settings}), zero_stage=2)


def test_ranks_that_would_wait_forever_are_refused():
    uneven = AcceleratorConfig(even_batches=False)
    check(True)
    check(False, accelerator_config=uneven, world_size=1)
    with pytest.raises(ValueError, match="even_batches false in --accelerator_config .*leave it out"):
        check(False, accelerator_config=uneven)  # counting a step's tokens is a collective, too
    for name in ("split_batches", "dispatch_batches"):
        with pytest.raises(ValueError, match=f"{name} in --accelerator_config .*leave it out"):
            check(False, accelerator_config=AcceleratorConfig(**{name: True}))


def test_losses_that_are_not_the_models_own_are_refused(tmp_path):
    check(True, loss_type="nll")
    with pytest.raises(ValueError, match="--loss_type dft is not supported.*--loss_type nll"):
        check(True, loss_type="dft")
    rows = small_trainer.Rows(ragged_batch(rows=8))
    args = small_trainer.make_trainer(tiny_model(), rows, tmp_path).args
    with pytest.raises(ValueError, match="compute_loss_func .*override compute_loss in a subclass"):
        LDMoLETrainer(tiny_model(), args, train_dataset=rows, compute_loss_func=lambda *args, **kwargs: 0)
