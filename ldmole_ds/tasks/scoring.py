"""Which candidate does a model find most probable? Summed log-probabilities of candidates after their prompts.

Legend: `B` questions, `W` tokens of the longest row, `C` candidates, `L` tokens of the longest candidate, `V` size of
the vocabulary.

Under expert parallelism a forward pass contains collectives, so all ranks must run the same number of them whatever
their questions look like. That number is 1, or `C` of the whole dataset, and never depends on a batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ldmole_ds.tasks.collate import ABSENT_TOKEN, IGNORED_LABEL, position_ids_of
from ldmole_ds.tasks.tokenize import EncodedQuestion

# Where engines and wrappers keep the model they wrap: DeepSpeed and DDP, PEFT (twice), torch.compile.
_WRAPPED_AT = ("module", "base_model", "model", "_orig_mod")


def score_candidates(model: nn.Module, batch: Mapping[str, Tensor], *, single_token: bool) -> Tensor:
    """Scores every candidate of a batch. Call it under `torch.no_grad()` to evaluate.

    Args:
        model: A causal LM, or an engine or wrapper around one. Its forward takes `input_ids` and `attention_mask`, and
            its output has `logits`. `position_ids`, `logits_to_keep` and `use_cache` are passed where it accepts them.
        batch: What `ChoiceCollator` returns, on the model's device.
        single_token: `ChoiceDataset.single_token`, the same on every rank. True: one forward pass on the prompts.
            False: `C` forward passes, one for each place in the list of candidates.

    Returns:
        (B, C), float32: the log-probability of the candidate's tokens given the prompt, divided by its length if the
        question has lengths; -inf where there is none.
    """
    candidate_ids = batch["candidate_ids"]  # (B, C, L)
    if single_token and candidate_ids.shape[-1] != 1:
        raise ValueError(
            f"single_token is true but candidates take up to {candidate_ids.shape[-1]} tokens; "
            "pass ChoiceDataset.single_token of all datasets that the collator serves"
        )
    prompt_ids, prompt_mask = _prompts(batch)
    present = candidate_ids[..., 0] != ABSENT_TOKEN  # (B, C)
    if single_token:
        log_probs = _log_probs(model, prompt_ids, prompt_mask, num_positions=1)[:, 0]  # (B, V)
        scores = log_probs.gather(1, candidate_ids[..., 0].clamp(min=0))
    else:
        slots = [_score_slot(model, prompt_ids, prompt_mask, ids) for ids in candidate_ids.unbind(dim=1)]
        scores = torch.stack(slots, dim=1)
    return (scores / batch["candidate_lengths"]).masked_fill(~present, float("-inf"))


def accuracy(scores: Tensor, gold: Tensor) -> float:
    """The share of questions whose highest score, the first one of equals, is at the right candidate.

    Args:
        scores: (B, C).
        gold: (B,), int64.
    """
    return (scores.argmax(dim=-1) == gold).float().mean().item()


def score_candidates_reference(model: nn.Module, question: EncodedQuestion) -> Tensor:
    """The same scores by the shortest way: one candidate at a time, no batch, no padding, no masks.

    Returns:
        (C,), float32, for the candidates of this question.
    """
    device = next(model.parameters()).device
    scores = []
    for candidate in question.candidate_ids:
        ids = torch.tensor([*question.prompt_ids, *candidate], device=device)
        log_probs = model(input_ids=ids[None]).logits[0].float().log_softmax(dim=-1)  # (tokens, V)
        first = len(question.prompt_ids)
        # The logits at a position are about the token after it.
        scores.append(sum(log_probs[first + i - 1, token] for i, token in enumerate(candidate)))
    return torch.stack(scores) / torch.tensor(question.lengths or [1], device=device)


def _prompts(batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Takes the right answers off the rows and moves the prompts to the right end: ids and mask, each (B, W - 1).

    The shift of each row is a gather, so that no count has to reach the host. One column goes since every answer has a
    token; rows with longer answers get more padding on their left.
    """
    input_ids, mask = batch["input_ids"], batch["attention_mask"]
    answer_length = (batch["labels"] != IGNORED_LABEL).sum(dim=1, keepdim=True)  # (B, 1)
    source = torch.arange(1, input_ids.shape[1], device=input_ids.device) - answer_length  # (B, W - 1)
    inside = source >= 0
    source = source.clamp(min=0)
    return input_ids.gather(1, source), mask.gather(1, source) * inside


def _score_slot(model: nn.Module, prompt_ids: Tensor, prompt_mask: Tensor, candidate_ids: Tensor) -> Tensor:
    """Scores one candidate of each question: (B,) from `candidate_ids` (B, L), padded on the right with -1.

    A question without a candidate in this place goes through the model as its prompt alone; its score is 0.
    """
    is_token = candidate_ids != ABSENT_TOKEN
    tokens = candidate_ids.clamp(min=0)
    input_ids = torch.cat([prompt_ids, tokens], dim=1)
    mask = torch.cat([prompt_mask, is_token.to(prompt_mask.dtype)], dim=1)
    # The last prompt position and every candidate position but the last say what the candidate's tokens are.
    num_positions = tokens.shape[1] + 1
    log_probs = _log_probs(model, input_ids, mask, num_positions=num_positions)[:, :-1]  # (B, L, V)
    token_scores = log_probs.gather(-1, tokens[..., None])[..., 0]
    return token_scores.masked_fill(~is_token, 0.0).sum(dim=1)


def _log_probs(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, *, num_positions: int) -> Tensor:
    """One forward pass: log-probabilities at the last positions, (B, num_positions, V), in float32."""
    optional = {
        "position_ids": position_ids_of(attention_mask),
        "logits_to_keep": num_positions,
        "use_cache": False,
    }
    accepted = {name: value for name, value in optional.items() if _accepts(model, name)}
    logits = model(input_ids=input_ids, attention_mask=attention_mask, **accepted).logits
    return logits[:, -num_positions:].float().log_softmax(dim=-1)


def _accepts(model: nn.Module, name: str) -> bool:
    """Whether a model's forward has the parameter `name`, looking through wrappers that pass on what they are given."""
    parameters = inspect.signature(model.forward).parameters
    if name in parameters:
        return True
    passes_on = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    # A Transformers model is the end of the search: its own `model` is the part without the LM head.
    if not passes_on or isinstance(model, PreTrainedModel):
        return False
    # Not getattr: wrappers answer for attributes of what they wrap, and would lead past it.
    own = {**vars(model), **dict(model.named_children())}
    inner = next((own[place] for place in _WRAPPED_AT if isinstance(own.get(place), nn.Module)), None)
    return inner is not None and _accepts(inner, name)
