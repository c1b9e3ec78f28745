"""From a conversation to text, and where in the text its answers are.

The text is the chat template's, and an answer is what the template writes after its generation prompt: what a model
will have to write. A template that marks answers itself (`{% generation %}`) is taken at its word. Others are rendered
turn by turn, and each rendering must begin the next one. Some templates write an answer differently once more turns
follow (Qwen3 drops its empty thoughts); then each answer becomes a text of its own, as it is when it is generated.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from ldmole_ds.tasks.rows import DataError
from ldmole_ds.tasks.sft.rows import Conversation

_PLAIN = (
    "{% for message in messages %}"
    "{{ message['role'] | capitalize }}: {{ message['content'] | trim }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
_MARKS_ANSWERS = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class AnsweredText:
    """A text, and the characters `[start, end)` of each answer in it, in their order."""

    text: str
    answers: tuple[tuple[int, int], ...]


def ensure_chat_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Give a tokenizer without a chat template the plain one, which is then saved with it.

    `System: ...`, `User: ...` and `Assistant: ...`, a blank line after each, EOS after each answer, and BOS first where
    the tokenizer puts it before any text.

    Returns:
        Whether it had none.
    """
    if tokenizer.chat_template is not None:
        return False
    begins = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    ends = _PLAIN if tokenizer.eos_token is not None else _PLAIN.replace("{{ eos_token }}", "")
    tokenizer.chat_template = ("{{ bos_token }}" if begins else "") + ends
    return True


def render_answers(tokenizer: PreTrainedTokenizerBase, conversation: Conversation, where: str) -> list[AnsweredText]:
    """One text with all answers, or one for each answer where the template asks for it.

    Raises:
        DataError: The template cannot render the conversation, or does not say where an answer begins.
    """
    messages, answers = list(conversation.messages), conversation.answers
    _check_tools(tokenizer, conversation, where)
    tools = list(conversation.tools) or None
    if _MARKS_ANSWERS.search(template_of(tokenizer)):
        return [_marked(tokenizer, conversation, where)]
    whole = _render(tokenizer, messages, where, tools=tools)
    texts = []
    for i in answers:
        before = _render(tokenizer, messages[:i], where, tools=tools, add_generation_prompt=True)
        through = _render(tokenizer, messages[: i + 1], where, tools=tools)
        if not through.startswith(before) or len(through) == len(before):
            raise DataError(
                f"{where}: the chat template does not begin message {i + 1} with its generation prompt, so where the "
                "answer begins is unknown; mark answers in the template with {% generation %}"
            )
        texts.append(AnsweredText(through, ((len(before), _end(tokenizer, through, len(before))),)))
    if all(whole.startswith(part.text) for part in texts):
        return [AnsweredText(whole, tuple(span for part in texts for span in part.answers))]
    return texts


def _check_tools(tokenizer: PreTrainedTokenizerBase, conversation: Conversation, where: str) -> None:
    """What a template does not mention it leaves out of the text without a word."""
    uses = {
        "tools": bool(conversation.tools),
        "tool_calls": any(message.get("tool_calls") for message in conversation.messages),
    }
    missing = [name for name, used in uses.items() if used and name not in template_of(tokenizer)]
    if missing:
        raise DataError(
            f"{where}: the conversation has {' and '.join(missing)}, which this chat template has no place for; take a "
            "model whose template has, or leave such rows out"
        )


def template_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """The template's source."""
    return tokenizer.get_chat_template()


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], where: str, **options: Any) -> str:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except Exception as error:  # Jinja's, and whatever the template's own code raises
        raise DataError(_cannot_render(where, error)) from None


def _marked(tokenizer: PreTrainedTokenizerBase, conversation: Conversation, where: str) -> AnsweredText:
    try:
        texts, spans = render_jinja_template(
            conversations=[list(conversation.messages)],
            tools=list(conversation.tools) or None,
            chat_template=template_of(tokenizer),
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
    except Exception as error:
        raise DataError(_cannot_render(where, error)) from None
    turns = sum(message["role"] == "assistant" for message in conversation.messages)
    if len(spans[0]) != turns:
        raise DataError(
            f"{where}: the chat template marks {len(spans[0])} answers with {{% generation %}}, but the conversation "
            f"has {turns} assistant turns; correct the template"
        )
    return AnsweredText(texts[0], tuple(map(tuple, spans[0][turns - len(conversation.answers) :])))


def _end(tokenizer: PreTrainedTokenizerBase, text: str, start: int) -> int:
    """Where the answer at the end of `text` ends: line breaks after its end-of-turn token are not generated."""
    stripped = text.rstrip()
    ends = tuple(tokenizer.all_special_tokens) + tuple(map(str, tokenizer.added_tokens_decoder.values()))
    return len(stripped) if len(stripped) > start and stripped.endswith(ends) else len(text)


def _cannot_render(where: str, error: Exception) -> str:
    reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return f"{where}: the chat template cannot render this conversation ({reason}); give turns in the order it expects"
