"""Adapters in EleutherAI's lm-evaluation-harness (the package ``lm_eval``, which only this file needs).

    python -m ldmole_ds.tasks.lm_eval_model run --model ldmole --model_args adapter=runs/mine --tasks arc_easy

is the harness's own command line with one model more, ``ldmole``. In Python:

    from ldmole_ds.tasks.lm_eval_model import LDMoLELM
    lm_eval.simple_evaluate(model=LDMoLELM("runs/mine"), tasks=["arc_easy"])
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from ldmole_ds.tasks.adapted_model import load_adapted


@register_model("ldmole")
class LDMoLELM(HFLM):
    """The harness's Hugging Face model around an adapter: every task type of the harness works as for any model.

    Prompts, scoring and splits are the harness's, so its figures cannot be set beside those of ``launch/evaluate.py``.

    Args:
        adapter: Folder of a run, a checkpoint or an adapter, or a hub id; None: the bare base model.
        pretrained: Base model; None: the adapter's, or the embedded one.
        revision, trust_remote_code, dtype: Of the base model.
        device: cuda, cpu, ...; cpu where there is no CUDA, since the harness says cuda unless it is told otherwise.
        **kwargs: Of the harness's ``HFLM``: batch_size, max_length, add_bos_token, ...

    Raises:
        OSError, ValueError: As `load_adapted`.
    """

    def __init__(
        self,
        adapter: str | Path | None = None,
        pretrained: str | None = None,
        *,
        revision: str | None = None,
        trust_remote_code: bool = False,
        dtype: str = "auto",
        device: str = "cuda",
        **kwargs: Any,
    ) -> None:
        source = {"revision": revision, "trust_remote_code": trust_remote_code, "dtype": dtype}
        model, tokenizer = load_adapted(adapter, pretrained, **source)
        if device.startswith("cuda") and not torch.cuda.is_available():
            device = "cpu"
        super().__init__(pretrained=model.to(device), tokenizer=tokenizer, backend="causal", **kwargs)


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
