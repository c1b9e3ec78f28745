"""Supervised fine-tuning: from data arguments to documents, and what the Trainer does with them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.nn import functional as F
from transformers import EvalPrediction, PreTrainedTokenizerBase

from ldmole_ds.tasks import DataError, padding_id
from ldmole_ds.tasks.benchmarks.load import load_hub_rows
from ldmole_ds.tasks.rows import Row, number_rows, read_rows
from ldmole_ds.tasks.sft.collate import DocumentCollator, PackedCollator
from ldmole_ds.tasks.sft.packing import PackedDataset
from ldmole_ds.tasks.sft.rows import is_sft_row
from ldmole_ds.tasks.sft.template import ensure_chat_template
from ldmole_ds.tasks.sft.tokens import DocumentDataset, file_fingerprint, tokenize_rows
from ldmole_ds.training.argument_groups import DataArguments
from ldmole_ds.training.step_loss import keep_answer_logits
from ldmole_ds.training.trainer import LDMoLETrainer


@dataclass
class SFTData:
    """Datasets and collator of a run on conversations or prompt-completion pairs.

    Attributes:
        documents: The training documents.
        train: What the Trainer draws from: the documents, or rows of several.
        validation: Held-out documents, never packed.
        collator: Of `train`.
        pad_token_id: For the batches of the evaluation.
        description: Where the rows came from.
        max_seq_length: The longest row.
        plain: Whether conversations are in the plain format, since the tokenizer had no chat template.
    """

    label_words: ClassVar[None] = None
    metric_names: ClassVar[tuple[str, ...]] = ("loss", "perplexity")  # of `token_mean_metrics`

    documents: DocumentDataset
    train: DocumentDataset | PackedDataset
    validation: DocumentDataset | None
    collator: DocumentCollator | PackedCollator
    pad_token_id: int
    description: str
    max_seq_length: int
    plain: bool

    @property
    def longest_row(self) -> int:
        """Tokens of the longest training row."""
        return max(map(int, self.train.lengths))

    def check_positions(self, limit: int | None) -> None:
        """Refuse documents longer than a model has positions for; a packed row may be, its positions start again.

        Raises:
            DataError: Names the flag.
        """
        longest = max(int(s.lengths.max()) for s in (self.documents, self.validation) if s is not None)
        if limit is not None and longest > limit:
            raise DataError(
                f"a document has {longest} tokens, but the model has {limit} positions: use --max_seq_length {limit}"
            )

    def summary(self) -> str:
        """The data in one line."""
        documents = self.documents
        text = f"{len(documents)} train" + (f", {len(self.validation)} held-out" if self.validation else "")
        learnt = f"{documents.num_answer_tokens} of {documents.lengths.sum()} tokens learnt"
        text += f" documents of {self.description}, {learnt}"
        if isinstance(self.train, PackedDataset):
            filled = documents.lengths.sum() / (len(self.train) * self.max_seq_length)
            text += f", packed into {len(self.train)} rows of {self.max_seq_length} tokens ({filled:.0%} full)"
        sets = [s for s in (documents, self.validation) if s is not None]
        cut, left_out = (sum(getattr(s, name) for s in sets) for name in ("num_truncated", "num_left_out"))
        notes = [f"{cut} cut to --max_seq_length"] if cut else []
        notes += [f"{left_out} left out: their answer alone is longer"] if left_out else []
        notes += ["no chat template: plain format"] if self.plain else []
        return text + (f" ({'; '.join(notes)})" if notes else "")


def is_sft_data(arguments: DataArguments) -> bool:
    """Whether the rows are conversations or prompt-completion pairs, by the columns of the first one.

    Raises:
        DataError: The rows cannot be read.
    """
    if arguments.task or arguments.text_column or arguments.label_column:
        return False
    if arguments.dataset_name:
        return is_sft_row(dict.fromkeys(_hub_split(arguments, arguments.train_split).column_names))
    return bool(arguments.train_file) and is_sft_row(read_rows(arguments.train_file)[0].fields)


def load_sft_data(arguments: DataArguments, tokenizer: PreTrainedTokenizerBase) -> SFTData:
    """Read, check, tokenise or find in the cache, and pack.

    Raises:
        DataError: A row or a setting does not fit.
    """
    for flag, default in (("label_words", None), ("scoring", None), ("data_dir", None), ("mixture", "size")):
        if getattr(arguments, flag) != default:
            raise DataError(f"--{flag} is for questions with answers to choose from, not for messages: leave it out")
    for flag in ("max_seq_length", "preprocessing_num_workers", "max_train_samples", "max_eval_samples"):
        value = getattr(arguments, flag)
        if value is not None and value < 1:
            raise DataError(f"--{flag} must be at least 1, got {value}")
    plain = ensure_chat_template(tokenizer)
    documents = _documents(arguments, tokenizer, "train")
    validation, length, pad = None, arguments.max_seq_length, padding_id(tokenizer)
    if _has_validation(arguments):
        validation = _documents(arguments, tokenizer, "validation")
    return SFTData(
        documents=documents,
        train=PackedDataset(documents, length) if arguments.packing else documents,
        validation=validation,
        collator=PackedCollator(pad) if arguments.packing else DocumentCollator(pad),
        pad_token_id=pad,
        description=arguments.dataset_name or "/".join(Path(arguments.train_file).parts[-2:]),
        max_seq_length=length,
        plain=plain,
    )


def _documents(arguments: DataArguments, tokenizer: PreTrainedTokenizerBase, part: str) -> DocumentDataset:
    limit = arguments.max_train_samples if part == "train" else arguments.max_eval_samples
    if arguments.dataset_name:
        split = arguments.train_split if part == "train" else arguments.validation_split or "validation"
        rows, source = _hub_split(arguments, split), f"{arguments.dataset_name}[{split}]"
        fingerprint = f"{rows._fingerprint}:{source}:{limit}"

        def read() -> list[Row]:
            return number_rows(rows.select(range(min(limit or len(rows), len(rows)))), source)
    else:
        source = arguments.train_file if part == "train" else arguments.validation_file
        fingerprint = file_fingerprint(source, limit)

        def read() -> list[Row]:
            return read_rows(source)[:limit]

    workers = arguments.preprocessing_num_workers
    return tokenize_rows(read, fingerprint, tokenizer, arguments.max_seq_length, source=source, workers=workers)


def _has_validation(arguments: DataArguments) -> bool:
    if not arguments.dataset_name:
        return arguments.validation_file is not None
    if arguments.validation_split:
        return True
    from datasets import get_dataset_split_names

    splits = get_dataset_split_names(arguments.dataset_name, arguments.dataset_config_name)
    return "validation" in splits


def _hub_split(arguments: DataArguments, split: str) -> Any:
    try:
        return load_hub_rows(arguments.dataset_name, arguments.dataset_config_name, split)
    except DataError as error:
        remedy = "check the name, --dataset_config_name and the splits asked for, or give --train_file"
        raise DataError(f"--dataset_name: {error} -- {remedy}") from error


class SFTLossTrainer(LDMoLETrainer):
    """Evaluates by the mean over all held-out answer tokens, whatever the batches and ranks."""

    def __init__(self, *args: Any, eval_collator: DocumentCollator, **kwargs: Any) -> None:
        super().__init__(*args, compute_metrics=token_mean_metrics, **kwargs)
        self.eval_collator = eval_collator

    def get_eval_dataloader(self, eval_dataset=None):
        """Held-out documents are not packed: each counts by itself."""
        train_collator, self.data_collator = self.data_collator, self.eval_collator
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = train_collator

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """For each row the sum of its negative log-probabilities, and in the place of labels their number."""
        inputs = self._accepted(self._prepare_inputs(inputs))
        inputs = keep_answer_logits(inputs, self._forward_parameters)
        labels = inputs.pop("labels")
        with torch.no_grad():
            logits = model(**inputs)["logits"]
        targets = labels[:, 1:]
        sums = [
            F.cross_entropy(row[:-1].float(), target, ignore_index=-100, reduction="sum")
            for row, target in zip(logits, targets, strict=True)
        ]
        return None, torch.stack(sums), targets.ne(-100).sum(1)


def token_mean_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """`loss`, the mean over tokens, and `perplexity`, its exponential."""
    loss = float(prediction.predictions.astype("float64").sum() / prediction.label_ids.sum())
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
