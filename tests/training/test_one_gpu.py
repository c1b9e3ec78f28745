"""One process that sees several GPUs trains on one of them, and says how to use all."""

import logging

from transformers import TrainingArguments

from ldmole_ds.training.trainer import LDMoLETrainer
from tests.tiny import ragged_batch, tiny_model
from tests.training.small_trainer import Rows


def test_no_data_parallel_copies(tmp_path, caplog):
    options = {"report_to": "none", "disable_tqdm": True, "max_steps": 1, "save_strategy": "no"}
    args = TrainingArguments(str(tmp_path), per_device_train_batch_size=2, use_cpu=True, **options)
    assert args.device.type == "cpu"
    args._n_gpu = 2  # as on a host with two
    with caplog.at_level(logging.WARNING):
        trainer = LDMoLETrainer(tiny_model(), args, train_dataset=Rows(ragged_batch()))
    assert "one process trains on one of the 2 GPUs that it sees" in caplog.text
    assert "deepspeed --num_gpus 2, or torchrun --nproc_per_node 2" in caplog.text
    assert args.n_gpu == 1 and trainer.get_train_dataloader().total_batch_size == 2
    assert trainer._wrap_model(trainer.model) is trainer.model
