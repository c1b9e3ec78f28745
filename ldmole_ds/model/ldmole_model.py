"""`LDMoLEModel`: a Hugging Face model with experts, which behaves like the model it wraps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ldmole_ds.config import LDMoLEConfig
from ldmole_ds.distributed.zero import is_zero3_parameter
from ldmole_ds.model import adapter_io, hub, merge, reference_adapter
from ldmole_ds.model.adapted_forward import AdaptedForward
from ldmole_ds.model.adapter_checks import check_against_config

REENTRANT_REFUSED = (
    "reentrant checkpointing loses the auxiliary losses' graph: pass use_reentrant=False "
    "(--activation_checkpointing_kwargs '{\"use_reentrant\": false}')"
)


class LDMoLEModel(AdaptedForward):
    """A model with LoRA experts; made by `get_ldmole_model` or `from_pretrained`, not directly.

    It forwards signature, ``config``, ``generate`` and every other attribute to the base model. ``out.loss`` includes
    the weighted auxiliary losses while training; in eval mode it is the base model's loss alone and no collective for
    statistics runs. Threads that call one model at once run it one after another.

    Attributes:
        base_model: The Hugging Face model, its linear layers replaced in place.
        adapter_config: The adapter's configuration.
        input_groups: Owners of all router and expert parameters.
        lambda_mlps: The shared lambda MLPs by input width (empty with ``lambda_sharing="per_layer"``).
        topology: The expert-parallel layout.
        expert_dispatch: How tokens and experts meet: tokens, weights, or what ``auto`` chose and why.
        comm_stats: Calls, rows and bytes of the expert-parallel collectives so far.
        routing: Routing statistics since the last reset.
        adaptive_l1: Control of the L1 loss of router relu, else None.
    """

    # The Trainer asks for it before it trains on a quantised base: trainable adapters are attached.
    _hf_peft_config_loaded = True

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model, name)

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict | None = None, **kwargs: Any
    ) -> None:
        """Trade compute for memory. Non-reentrant only, which is the default here; not under ``torch.compile``.

        Args:
            activation_checkpointing_kwargs: For ``torch.utils.checkpoint.checkpoint``.
            **kwargs: For the base model's method.

        Raises:
            ValueError: ``use_reentrant=True`` was asked for.
        """
        options = dict(activation_checkpointing_kwargs or {})
        if options.setdefault("use_reentrant", False):
            raise ValueError(REENTRANT_REFUSED)
        options["context_fn"] = self._holder.checkpoint_contexts
        if hasattr(self.base_model, "activation_checkpointing_enable"):
            self.base_model.activation_checkpointing_enable(activation_checkpointing_kwargs=options, **kwargs)
        else:
            self.base_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options, **kwargs)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict | None = None, **kwargs: Any) -> None:
        """The older name of `activation_checkpointing_enable`."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **kwargs)

    @property
    def needs_all_ranks(self) -> bool:
        """Whether a forward pass has collectives, so that all ranks must run equally many.

        It has where experts are partitioned and not disabled, or where ZeRO-3 gathers parameters.
        """
        partitioned = self._holder.enabled and any(group.partitioned for group in self.input_groups)
        return self.topology.world_size > 1 and (partitioned or any(map(is_zero3_parameter, self.parameters())))

    def generate(self, *args: Any, synced_gpus: bool | None = None, **kwargs: Any) -> Any:
        """The base model's ``generate``. Collective where `needs_all_ranks`.

        Args:
            *args: As the base model.
            synced_gpus: Ranks that have finished keep on taking part until all have; default: where `needs_all_ranks`.
            **kwargs: As the base model.
        """
        if synced_gpus is None and self.needs_all_ranks:
            synced_gpus = True
        with self._holder.lock:
            return self.base_model.generate(*args, synced_gpus=synced_gpus, **kwargs)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Inside, the model is the bare base model: its exact outputs, no auxiliary losses, no expert collective.

        May be nested; the adapter is back after the outermost one, exceptions included.

        Raises:
            ValueError: ``modules_to_save`` were trained in place, so that the base's own weights are gone.
        """
        if self.adapter_config.modules_to_save:
            raise ValueError(
                f"disable_adapter: {self.adapter_config.modules_to_save} (modules_to_save) are trained in place, and "
                "the base's own weights are not kept: load the base model a second time for its outputs"
            )
        before, self._holder.enabled = self._holder.enabled, False
        try:
            yield
        finally:
            self._holder.enabled = before

    def routing_summary(self, reduce: bool = False) -> dict[str, dict]:
        """Per projection: mean experts per token, load per expert, mean lambda and its spread over tokens, live hidden
        units of the lambda MLP; see `RoutingStatistics.summary`. Collective with ``reduce=True``."""
        return self.routing.summary(reduce)

    def reset_routing_summary(self) -> None:
        """Start the routing statistics anew."""
        self.routing.reset()

    def num_parameters_by_kind(self) -> dict[str, int]:
        """Trainable parameters over all ranks, and those held by this rank."""
        return adapter_io.count_parameters(self)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Write ``adapter_config.json`` and one ``adapter_model.safetensors`` with all experts of all ranks.

        Collective: every rank calls it; rank 0 writes. Works under every ZeRO stage.
        """
        adapter_io.save_adapter(self, Path(save_directory))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
        commit_message: str = "Upload the adapter",
        create_pr: bool = False,
    ) -> str | None:
        """Upload the adapter's two files, and a model card where there is none, in one commit.

        Collective: every rank calls it; rank 0 uploads.

        Args:
            repo_id: ``user/adapter``; made if it does not exist.
            private: Whether a new repository is private; default: as the user's settings say.
            token: Default: the one stored by ``hf auth login``.
            revision: Branch, made if it does not exist; default: main.
            commit_message: Of the commit.
            create_pr: Open a pull request instead.

        Returns:
            The commit's address on rank 0, None on others.

        Raises:
            OSError: The upload failed; on every rank.
        """
        return hub.push_adapter(
            self,
            repo_id,
            private=private,
            token=token,
            revision=revision,
            commit_message=commit_message,
            create_pr=create_pr,
        )

    @classmethod
    def from_pretrained(
        cls,
        base_model: nn.Module,
        folder: str | Path,
        *,
        ep_size: int = 1,
        expert_dispatch: str = "tokens",
        revision: str | None = None,
        token: str | None = None,
    ) -> LDMoLEModel:
        """Wrap ``base_model`` and load an adapter; needs torch, transformers and safetensors only.

        Args:
            base_model: The model that the adapter was trained on, bare.
            folder: An adapter's or a checkpoint's folder, or a hub id, of which two files are fetched.
            ep_size, expert_dispatch: As in `get_ldmole_model`; they need not be those of training.
            revision, token: Of a hub id.

        Returns:
            The model in eval mode.

        Raises:
            FileNotFoundError: There is no such adapter.
            ValueError: The adapter is damaged, holds NaN, or belongs to another base model.
        """
        from ldmole_ds.model.inject import get_ldmole_model

        path = hub.adapter_folder(folder, revision=revision, token=token)
        config, state = LDMoLEConfig.from_pretrained(path), adapter_io.read_adapter(path)
        check_against_config(config, state, path)
        model = get_ldmole_model(base_model, config, ep_size=ep_size, expert_dispatch=expert_dispatch)
        adapter_io.load_state(model, state, source=str(path))
        return model.eval()

    def merge_and_unload(self) -> nn.Module:
        """The base model with a plain LoRA adapter (router ``lora``) added into its weights, as in PEFT.

        Equal outputs but for rounding to the base's dtype; ``save_pretrained`` writes an ordinary model. This model
        must not be used afterwards: its layers are taken apart.

        Raises:
            ValueError: Merging would not be exact (a mixture's weights depend on the token), the base is quantised, or
                ZeRO-3 holds its weights; the model is as it was.
        """
        return merge.merge_and_unload(self)

    def load_reference_adapter(self, state_dict_or_path: dict[str, Tensor] | str | Path) -> None:
        """Load weights written by the authors' code; see `reference_adapter`."""
        reference_adapter.load_reference_adapter(self, state_dict_or_path)
