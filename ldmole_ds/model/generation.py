"""Many prompts through ``generate``: batches of similar length, padded on the left, answers in the prompts' order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase


def generate_texts(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    names: Sequence[str] | None = None,
    batch_size: int = 8,
    max_new_tokens: int = 32,
    on_progress: Callable[[int], Any] = lambda rows: None,
    **options: Any,
) -> list[str]:
    """What the model adds to each prompt, in the order of the prompts.

    Without sampling the batch size changes rounding at most. Sampling draws for a whole batch at once: set torch's seed
    before, and keep the batch size, to get the same texts again.

    Args:
        model: An `LDMoLEModel` or any causal language model, in eval mode.
        tokenizer: Its tokenizer.
        prompts: Texts to continue.
        names: Of the prompts, for errors; default: their numbers.
        batch_size: Prompts that are generated together.
        max_new_tokens: Longest continuation.
        on_progress: Told after each batch how many rows it had.
        **options: For ``generate``: ``num_beams``, ``do_sample``, ``temperature``, ...

    Raises:
        ValueError: A prompt has no tokens, or more than the model has positions for; before anything is generated.
    """
    names = names or [f"prompt {i}" for i in range(len(prompts))]
    encoded = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    limit = getattr(model.config, "max_position_embeddings", None)
    for name, ids in zip(names, encoded, strict=True):
        if not ids:
            raise ValueError(f"{name}: the prompt has no tokens: give it some text")
        if limit and len(ids) + max_new_tokens > limit:
            raise ValueError(
                f"{name}: {len(ids)} tokens and {max_new_tokens} new ones are more than the model's {limit} positions: "
                "shorten the prompt, or lower max_new_tokens"
            )
    device = next(model.parameters()).device
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    texts = [""] * len(encoded)
    # The longest first: what does not fit into memory fails at once.
    order = sorted(range(len(encoded)), key=lambda i: -len(encoded[i]))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        inputs = left_padded([encoded[i] for i in rows], pad, device)
        with torch.no_grad():
            output = model.generate(**inputs, max_new_tokens=max_new_tokens, pad_token_id=pad, **options)
        added = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for i, text in zip(rows, added, strict=True):
            texts[i] = text
        on_progress(len(rows))
    return texts


def left_padded(rows: Sequence[Sequence[int]], pad: int, device: torch.device | str) -> dict[str, Tensor]:
    """``input_ids`` and ``attention_mask``, each ``(B, S)`` int64, the rows' last tokens in the last column."""
    width = max(map(len, rows))
    ids = [[pad] * (width - len(row)) + list(row) for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return {"input_ids": torch.tensor(ids, device=device), "attention_mask": torch.tensor(mask, device=device)}
