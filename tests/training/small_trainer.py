"""A Trainer for a few steps on a few rows, in one process."""

import torch
from torch.utils.data import Dataset
from transformers import TrainingArguments

from ldmole_ds.training.trainer import LDMoLETrainer


class Rows(Dataset):
    """Rows of a batch, in order."""

    def __init__(self, batch):
        self.columns = batch

    def __len__(self):
        return len(self.columns["input_ids"])

    def __getitem__(self, index):
        return {name: column[index] for name, column in self.columns.items()}

    def batch(self, start=0, stop=None):
        return {name: column[start:stop] for name, column in self.columns.items()}


def make_trainer(model, rows, folder, **settings):
    """Plain gradient descent with rate 1 on rows in order, so that one step moves a weight by its gradient."""
    values = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "max_steps": 1,
        "learning_rate": 1.0,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    args = TrainingArguments(**{**values, **settings})
    return LDMoLETrainer(model, args, train_dataset=rows, eval_dataset=rows)


def trainable(model):
    """Copies of the trainable weights."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def logged(trainer, name):
    """All values of one logged quantity."""
    return torch.tensor([row[name] for row in trainer.state.log_history if name in row])
