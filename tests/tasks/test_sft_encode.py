"""Rows of supervised fine-tuning become these tokens, with a loss on these."""

import json

import pytest

from ldmole_ds.tasks import DataError
from ldmole_ds.tasks.rows import Row
from ldmole_ds.tasks.sft.encode import Document, encode_row, shorten
from ldmole_ds.tasks.sft.template import ensure_chat_template

CHATML = (
    "{% for m in messages %}{{ '<eos>' + m['role'] + '\n' + m['content'] + '<eos>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<eos>assistant\n' }}{% endif %}"
)
MARKED = CHATML.replace(
    "{{ '<eos>' + m['role'] + '\n' + m['content'] + '<eos>\n' }}",
    "{{ '<eos>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}<eos>{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m['content'] + '<eos>\n' }}{% endif %}",
)
# As Qwen3's: an answer has thoughts only while it is the last turn.
FORGETFUL = CHATML.replace(
    "m['content'] +", "('<t>' if m['role'] == 'assistant' and loop.last else '') + m['content'] +"
)
TURNS = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "pay a bill"},
    {"role": "assistant", "content": "which one"},
    {"role": "user", "content": "the gas"},
    {"role": "assistant", "content": "done"},
    {"role": "user", "content": "thanks"},
]
BEFORE = "<eos>system\nbe kind<eos>\n<eos>user\npay a bill<eos>\n<eos>assistant\n"


def documents(tokenizer, fields, template=None, max_length=500):
    tokenizer.chat_template = template
    ensure_chat_template(tokenizer)
    return encode_row(tokenizer, Row("rows:1", fields), max_length)


def shown(tokenizer, document):
    """The text, and the texts with a loss."""
    answers = [tokenizer.decode(document.input_ids[start:end]) for start, end in document.answers]
    return tokenizer.decode(document.input_ids), answers


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["by prefixes", "by marks"])
def test_every_assistant_turn_with_its_end_has_a_loss(gpt2_tokenizer, template):
    (document,) = documents(gpt2_tokenizer, {"messages": TURNS}, template)
    text, answers = shown(gpt2_tokenizer, document)
    assert answers == ["which one<eos>", "done<eos>"]
    # What follows the last answer is not computed.
    assert text == BEFORE + "which one<eos>\n<eos>user\nthe gas<eos>\n<eos>assistant\ndone<eos>"
    ids = gpt2_tokenizer(text)["input_ids"]
    assert list(document.input_ids) == ids
    places = {i for start, end in document.answers for i in range(start, end)}
    assert document.labels == [token if i in places else -100 for i, token in enumerate(ids)]


def test_a_prompt_of_messages_has_no_loss_on_its_own_answers(gpt2_tokenizer):
    row = {"prompt": TURNS[:4], "completion": TURNS[4:5]}
    for template in (CHATML, MARKED):
        (document,) = documents(gpt2_tokenizer, row, template)
        assert shown(gpt2_tokenizer, document)[1] == ["done<eos>"]


def test_a_template_that_rewrites_earlier_answers_gives_a_document_for_each(gpt2_tokenizer):
    first, second = documents(gpt2_tokenizer, {"messages": TURNS}, FORGETFUL)
    assert shown(gpt2_tokenizer, first) == (BEFORE + "<t>which one<eos>", ["<t>which one<eos>"])
    text = BEFORE + "which one<eos>\n<eos>user\nthe gas<eos>\n<eos>assistant\n<t>done<eos>"
    assert shown(gpt2_tokenizer, second) == (text, ["<t>done<eos>"])


@pytest.mark.parametrize("name", ["gpt2_tokenizer", "llama_tokenizer"])
def test_without_a_template_the_plain_format(name, request):
    tokenizer = request.getfixturevalue(name)
    (document,) = documents(tokenizer, {"messages": TURNS[1:]})
    text, answers = shown(tokenizer, document)
    assert len(answers) == 2 and all(answer.endswith(tokenizer.eos_token) for answer in answers)
    if name == "gpt2_tokenizer":
        assert text == "User: pay a bill\n\nAssistant: which one<eos>\n\nUser: the gas\n\nAssistant: done<eos>"
        assert answers == [" which one<eos>", " done<eos>"]
    else:
        assert document.input_ids[0] == tokenizer.bos_token_id not in document.input_ids[1:]
    prompt = tokenizer.apply_chat_template(TURNS[1:2], tokenize=True, add_generation_prompt=True)["input_ids"]
    assert list(document.input_ids[: document.answers[0][0]]) == prompt


@pytest.mark.parametrize("name", ["gpt2_tokenizer", "eos_tokenizer", "llama_tokenizer"])
def test_plain_text_keeps_its_border_and_ends(name, request):
    tokenizer = request.getfixturevalue(name)
    (document,) = documents(tokenizer, {"prompt": "Message: pay a bill\nTopic:", "completion": " bank"})
    (start, end), ids = document.answers[0], list(document.input_ids)
    prompt = tokenizer("Message: pay a bill\nTopic:")["input_ids"]
    if name == "eos_tokenizer":
        prompt = prompt[:-1]
    assert ids[:start] == prompt and end == len(ids) and ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids[start:]).strip() == f"bank{tokenizer.eos_token}"


def test_a_merge_across_the_border_is_cut(gpt2_tokenizer):
    whole = gpt2_tokenizer("Topic: bank")["input_ids"]
    (document,) = documents(gpt2_tokenizer, {"prompt": "Topic: ba", "completion": "nk"})
    (start, _), ids = document.answers[0], list(document.input_ids)
    assert ids[:-1] != whole  # the tokenizer has a token for the whole word
    assert ids[:start] == gpt2_tokenizer("Topic: ba")["input_ids"]
    assert gpt2_tokenizer.decode(ids[start:]) == "nk<eos>"


def test_a_border_that_the_tokenizer_cannot_keep_is_refused(llama_tokenizer):
    with pytest.raises(DataError, match="rows:1: this tokenizer joins"):
        documents(llama_tokenizer, {"prompt": "Topic: ba", "completion": "nk"})


def test_whole_answers_stay_when_a_row_is_too_long():
    document = Document(tuple(range(20)), ((5, 8), (12, 15), (18, 20)))
    assert shorten(document, 20) is document
    cut = Document(tuple(range(15)), ((5, 8), (12, 15)), cut=True)
    assert [shorten(document, length) for length in (19, 15)] == [cut, cut]
    assert shorten(document, 14) == Document(tuple(range(8)), ((5, 8),), cut=True)
    # The beginning of the prompt goes, but BOS.
    assert shorten(document, 7) == Document((1, 2, 3, 4, 5, 6, 7), ((4, 7),), cut=True)
    assert shorten(document, 7, bos_token_id=0) == Document((0, 2, 3, 4, 5, 6, 7), ((4, 7),), cut=True)
    assert shorten(document, 4) == Document((4, 5, 6, 7), ((1, 4),), cut=True)
    assert shorten(document, 3) is None and shorten(document, 4, bos_token_id=0) is None


ASSISTANT, USER = TURNS[2], TURNS[1]
CALLING = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "clock", "arguments": {}}}]}
# As Qwen3's and Llama 3's: tools before the first turn, calls in the place of what is said.
WITH_TOOLS = "{% if tools %}{{ tools[0]['name'] + '\n' }}{% endif %}" + CHATML.replace(
    "m['content'] +", "m['content'] + (m['tool_calls'][0]['function']['name'] if m['tool_calls'] else '') +"
)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"messages": []}, "'messages' is no list of messages"),
        ({"messages": [USER]}, "no assistant turn, so there is nothing to learn"),
        ({"messages": [ASSISTANT, USER]}, "begins with an assistant turn"),
        (
            {"messages": [USER, {"role": "bot", "content": "a"}]},
            "message 2 of 'messages' has the role 'bot'; expected one",
        ),
        ({"messages": [USER, {"role": "assistant", "content": " "}]}, "content of message 2 of 'messages' is empty"),
        ({"messages": [USER, {"role": "assistant"}]}, "content of message 2 of 'messages' is of type NoneType"),
        ({"messages": [{"role": "system", "content": None}, USER, ASSISTANT]}, "has no text under 'content'"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": "clock"}]}, "message 2 of 'messages' calls tools"),
        ({"messages": [USER, CALLING]}, "the conversation has tool_calls, which this chat template has no place for"),
        ({"messages": [USER, ASSISTANT], "tools": "a clock"}, "'tools' is no list of objects"),
        ({"messages": ["hello"]}, "message 1 of 'messages' is no object"),
        ({"prompt": [USER], "completion": "a"}, "one of prompt and completion is text"),
        ({"prompt": "a", "completion": ""}, "'completion' is empty"),
        ({"text": "a"}, "the keys are 'text'; expected"),
    ],
)
def test_a_row_that_cannot_be_learnt_is_refused(gpt2_tokenizer, fields, message):
    with pytest.raises(DataError, match="rows:1: .*" + message):
        documents(gpt2_tokenizer, fields, CHATML)


def test_calls_of_tools_are_answers(gpt2_tokenizer):
    turns = [USER, CALLING, {"role": "tool", "content": "noon"}, ASSISTANT]
    schema = [{"name": "clock", "parameters": None}]
    marked = WITH_TOOLS.replace("{{ '<eos>' + m", "{% generation %}{{ '<eos>' + m").replace(
        "<eos>\n' }}{% endfor", "<eos>\n' }}{% endgeneration %}{% endfor"
    )
    for tools in (schema, json.dumps(schema)):
        row = {"messages": turns, "tools": tools}
        (document,) = documents(gpt2_tokenizer, row, WITH_TOOLS)
        text, answers = shown(gpt2_tokenizer, document)
        assert answers == ["clock<eos>", "which one<eos>"] and text.startswith("clock\n<eos>user\npay a bill")
    with pytest.raises(DataError, match="marks 4 answers"):  # rendered with its tools there, too
        documents(gpt2_tokenizer, row, marked)


def test_a_template_that_cannot_render_is_named(gpt2_tokenizer):
    strict = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match=r"rows:1: the chat template cannot render .*roles must alternate"):
        documents(gpt2_tokenizer, {"messages": TURNS}, strict)
    # The generation prompt is not how the answer begins.
    other = CHATML.replace("'<eos>assistant\n'", "'<eos>model\n'")
    with pytest.raises(DataError, match=r"does not begin message 3 with its generation prompt"):
        documents(gpt2_tokenizer, {"messages": TURNS}, other)
    unmarked = MARKED.replace("m['role'] == 'assistant' %}", "loop.index == 3 %}")
    with pytest.raises(DataError, match="marks 1 answers .* has 2 assistant turns"):
        documents(gpt2_tokenizer, {"messages": TURNS}, unmarked)
