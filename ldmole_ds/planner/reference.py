"""The models whose steps the calibration times: too small to compute much, of thin products, with a large adapter."""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass

import torch
from torch import nn
from transformers import LlamaConfig

from ldmole_ds.config import LDMoLEConfig
from ldmole_ds.distributed import ExpertParallel
from ldmole_ds.model import LDMoLEModel, get_ldmole_model
from ldmole_ds.planner.layout import Batch
from ldmole_ds.planner.model_shape import ModelShape, build_base, shape_of_config
from ldmole_ds.planner.step_kind import StepKind
from ldmole_ds.planner.trace import StepTrace, trace_model


@dataclass(frozen=True)
class Reference:
    """A Llama by its sizes, ranks of the adapter, and rows and tokens of a micro-step."""

    hidden: int
    inner: int
    layers: int
    vocabulary: int
    r: int
    lambda_hidden: int
    batch: Batch

    @property
    def hf_config(self) -> LlamaConfig:
        return LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.inner,
            num_hidden_layers=self.layers,
            vocab_size=self.vocabulary,
            num_attention_heads=4,
            num_key_value_heads=2,
        )

    def adapter(self, num_experts: int = 8) -> LDMoLEConfig:
        """On every projection."""
        return LDMoLEConfig(num_experts=num_experts, r=self.r, lambda_hidden_size=self.lambda_hidden, lora_dropout=0.0)

    def base(self) -> nn.Module:
        """The same weights on every rank; the caller's random state stays as it is."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return build_base(self.hf_config)

    def ids(self, seed: int) -> torch.Tensor:
        """Token ids, ``(rows, length)``."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, self.vocabulary, (self.batch.micro, self.batch.length), generator=generator)

    @functools.cache  # noqa: B019  the references are constants
    def shape(self, num_experts: int) -> ModelShape:
        """Its sizes."""
        return shape_of_config(self.hf_config, self.adapter(num_experts))

    @functools.cache  # noqa: B019
    def trace(self, num_experts: int, kind: StepKind) -> StepTrace:
        """Operations of its step on one rank that has all experts."""
        with kind.fake_tensors(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = alone(get_ldmole_model(build_base(self.hf_config), self.adapter(num_experts)))
            return StepTrace(trace_model(kind.prepare(model), self.ids(0)))


def alone(model: LDMoLEModel) -> LDMoLEModel:
    """Without the collective that counts tokens over all ranks."""
    model.topology = ExpertParallel()
    return model


STARTING = Reference(32, 48, 2, 64, r=4, lambda_hidden=8, batch=Batch(2, 6))
# Its products are just large enough for the library that multiplies those of larger models (`ops.matrix_products`).
THIN = Reference(256, 704, 3, 2048, r=8, lambda_hidden=64, batch=Batch(4, 64))
WIDE = Reference(512, 704, 2, 1024, r=64, lambda_hidden=64, batch=Batch(1, 16))
