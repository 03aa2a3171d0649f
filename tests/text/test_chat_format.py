import copy
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cipo_jax.config import Config, ThinkConfig, parse
from cipo_jax.data.tiny_world import make_world, training_example
from cipo_jax.errors import UserError
from cipo_jax.hub import load_tokenizer, resolve
from cipo_jax.text.chat_format import THINK_CLOSE, THINK_OPEN, ChatFormat, Thought

QUESTION = "Where was Ada Brandt born?"
COT = "I recall Ada Brandt. Ada Brandt was born in Lisbon. So it is Lisbon."

# The behavior of well-known chat templates, in templates of our own.
R1_OLD = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ m.content }}"
    "{% elif m.role == 'user' %}<｜User｜>{{ m.content }}"
    "{% else %}<｜Assistant｜>{{ m.content.split('</think>')[-1] }}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<｜Assistant｜>{% endif %}"
)
R1_NEW = R1_OLD.replace("%}<｜Assistant｜>{% endif", "%}<｜Assistant｜><think>\n{% endif")
QWEN3 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)
CHATML = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n"
    "{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|head|>{{ m.role }}<|end_head|>\n\n"
    "{{ m.content | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|head|>assistant<|end_head|>\n\n{% endif %}"
)

# Newlines may be apart from punctuation or, as in many recent tokenizers, join it.
APART = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+"
JOINED = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"


def _texts():
    world = make_world(0, 60, 16)
    examples = [training_example(world, world.people, 0, i) for i in range(300)]
    return [text for e in examples for text in (e.question, e.cot, e.answer)]


def _tokenizer(template, special, added=(), bos=None, eos=None, adds_bos=False, pattern=JOINED):
    """A byte-level BPE with the given special and other added tokens."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = _texts()
    tagged = [f"<think>\n{text}\n</think>\n\nAnswer: {text}" for text in texts]
    tokenizer.train_from_iterator(tagged, trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in added])
    if adds_bos:
        tokenizer.post_processor = TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )


R1_TOKENS = {
    "special": ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"],
    "added": ["<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"],
    "bos": "<｜begin▁of▁sentence｜>",
    "eos": "<｜end▁of▁sentence｜>",
}
CHATML_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@pytest.fixture(scope="session")
def tokenizers():
    """One tokenizer of each kind, by its kind."""
    return {
        "tiny": load_tokenizer(resolve("asset:tiny_lrm/target")),
        "r1 old": _tokenizer(R1_OLD, **R1_TOKENS, adds_bos=True),
        "r1 new": _tokenizer(R1_NEW, **R1_TOKENS),
        "qwen3": _tokenizer(
            QWEN3, CHATML_SPECIAL, ["<think>", "</think>", "<|fim|>"], eos="<|im_end|>"
        ),
        "chatml": _tokenizer(CHATML, CHATML_SPECIAL, bos="<|im_start|>", eos="<|im_end|>"),
        "llama3": _tokenizer(
            LLAMA3,
            ["<|begin|>", "<|head|>", "<|end_head|>", "<|eot|>"],
            bos="<|begin|>", eos="<|eot|>", adds_bos=True, pattern=APART,
        ),
    }  # fmt: skip


KINDS = ("tiny", "r1 old", "r1 new", "qwen3", "chatml", "llama3")
WITH_TAGS = KINDS[:4]  # the think tags are tokens of their own
WITHOUT_TAGS = KINDS[4:]  # they are several tokens


@pytest.fixture(params=KINDS)
def format(request, tokenizers):
    return ChatFormat(copy.deepcopy(tokenizers[request.param]))


@pytest.fixture(params=WITH_TAGS)
def tagged(request, tokenizers):
    return ChatFormat(copy.deepcopy(tokenizers[request.param]))


@pytest.fixture(params=WITHOUT_TAGS)
def spelled(request, tokenizers):
    return ChatFormat(copy.deepcopy(tokenizers[request.param]))


@pytest.fixture
def tiny(tokenizers):
    return ChatFormat(copy.deepcopy(tokenizers["tiny"]))


def _with_template(format, template, **fields):
    format.tokenizer.chat_template = template
    return ChatFormat(format.tokenizer, **fields)


def _encode(format, text):
    return format.tokenizer.encode(text, add_special_tokens=False)


def _added(format):
    return {i: t.content for i, t in format.tokenizer.added_tokens_decoder.items()}


def _control(format, ids):
    return [i for i in ids if i in _added(format)]


def _message(call):
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- prompts


@pytest.mark.parametrize(
    ("kind", "prompt"),
    [
        ("tiny", "<｜begin▁of▁sentence｜><｜User｜>Who?<｜Assistant｜><think>\n"),
        ("r1 old", "<｜begin▁of▁sentence｜><｜User｜>Who?<｜Assistant｜><think>\n"),
        ("r1 new", "<｜begin▁of▁sentence｜><｜User｜>Who?<｜Assistant｜><think>\n"),
        ("qwen3", "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n<think>\n"),
        (
            "chatml",
            "<|im_start|>system\nYou are helpful.<|im_end|>\n<|im_start|>user\nWho?<|im_end|>\n"
            "<|im_start|>assistant\n<think>\n",
        ),
        (
            "llama3",
            "<|begin|><|head|>user<|end_head|>\n\nWho?<|eot|><|head|>assistant<|end_head|>\n\n"
            "<think>\n",
        ),
    ],
)
def test_each_kind_of_prompt(tokenizers, kind, prompt):
    format = ChatFormat(tokenizers[kind])
    assert format.prompt_text("Who?") == prompt
    assert format.tokenizer.decode(format.prompt_ids("Who?")) == prompt


@pytest.mark.parametrize(
    "question",
    [
        QUESTION,
        "Wer ist 里斯本, 42 % — naïve?\nAnd\n\nthen?",
        "a < b and c > d: <b>bold</b> | {x} {{ y }} {% z %}",
        "!\n",
        "\n  spaces around \t",
    ],
)
def test_ordinary_questions_have_the_ids_of_the_rendered_template(format, question):
    rendered = format.tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        tokenize=False,
        add_generation_prompt=True,
    )
    if not rendered.endswith("<think>\n"):
        rendered += "<think>\n"
    assert format.prompt_text(question) == rendered
    assert format.prompt_ids(question) == _encode(format, rendered)


def test_a_prompt_has_one_bos_if_any_and_no_eos_of_its_own(format):
    ids, bos = format.prompt_ids(QUESTION), format.tokenizer.bos_token_id
    if bos is None:
        return
    assert ids[0] == bos
    assert ids[1] != bos
    if format.tokenizer.bos_token != "<|im_start|>":
        assert ids.count(bos) == 1


def test_a_bos_that_the_tokenizer_adds_is_there_without_the_templates(tokenizers):
    for kind in ("r1 old", "llama3"):
        usual = ChatFormat(copy.deepcopy(tokenizers[kind]))
        expected = usual.prompt_ids(QUESTION)
        template = usual.tokenizer.chat_template
        without = template.replace("{{ bos_token }}", "")
        assert _with_template(usual, without).prompt_ids(QUESTION) == expected
        twice = template.replace("{{ bos_token }}", "{{ bos_token }}{{ bos_token }}")
        assert _with_template(usual, twice).prompt_ids(QUESTION) == expected


def test_no_bos_is_added_where_neither_tokenizer_nor_template_does(tokenizers):
    usual = ChatFormat(copy.deepcopy(tokenizers["r1 new"]))
    expected = usual.prompt_ids(QUESTION)
    without = R1_NEW.replace("{{ bos_token }}", "")
    assert _with_template(usual, without).prompt_ids(QUESTION) == expected[1:]


def test_what_the_template_does_to_white_space_is_kept(format):
    keeps = format.prompt_text(" who? ") != format.prompt_text("who?")
    assert keeps == ("trim" not in format.tokenizer.chat_template)


@pytest.mark.parametrize("side", ["lstrip", "rstrip"])
def test_a_template_may_strip_one_side(tiny, side):
    format = _with_template(tiny, "U:{{ messages[0]['content']." + side + "() }}:A:")
    stripped = getattr("  who? ", side)()
    assert format.prompt_text("  who? ") == f"U:{stripped}:A:<think>\n"


def test_a_template_may_repeat_the_question(tiny):
    format = _with_template(tiny, "{{ messages[0].content }} I say: {{ messages[0].content }}:")
    assert format.prompt_text("Who?") == "Who? I say: Who?:<think>\n"


def test_a_template_that_opens_it_without_a_newline_is_left_alone(tiny):
    template = tiny.tokenizer.chat_template.replace("<think>\n", "<think>")
    assert _with_template(tiny, template).prompt_text(QUESTION).endswith("<｜Assistant｜><think>")


def test_a_question_that_speaks_of_the_tag_does_not_pass_for_an_opened_block(tiny):
    format = _with_template(tiny, "{{ messages[0]['content'] }}")
    assert format.prompt_text("What is <think>") == "What is <think><think>\n"
    ids = format.prompt_ids("What is <think>")
    assert _control(format, ids) == _encode(format, "<think>")


def test_thinking_is_switched_on_where_the_template_has_a_switch(tokenizers):
    qwen = ChatFormat(copy.deepcopy(tokenizers["qwen3"]))
    for switch in ("not thinking", "not enable_thinking"):  # off where they are not given
        template = QWEN3.replace("enable_thinking is defined and not enable_thinking", switch)
        assert _with_template(qwen, template).prompt_text("Who?").endswith("assistant\n<think>\n")


def test_a_template_that_tells_the_date_gives_the_same_prompt_on_every_day(tiny):
    format = _with_template(tiny, "{{ strftime_now('%Y %B %d') }}|{{ messages[0].content }}|")
    assert format.prompt_text("Who?").split("|")[0] == "2024 July 26"


def test_of_several_templates_the_default_is_used(tiny):
    usual = tiny.prompt_ids(QUESTION)
    template = {"default": tiny.tokenizer.chat_template, "tool_use": "no"}
    assert _with_template(tiny, template).prompt_ids(QUESTION) == usual
    format = _with_template(tiny, {"tool_use": "no"})
    assert "config.think.prompt" in _message(lambda: format.prompt_ids(QUESTION))


def test_a_system_message(tokenizers):
    format = ChatFormat(tokenizers["qwen3"], system="Be terse.")
    assert format.prompt_text("Who?") == (
        "<|im_start|>system\nBe terse.<|im_end|>\n<|im_start|>user\nWho?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n"
    )
    chatml = ChatFormat(tokenizers["chatml"], system="Be terse.").prompt_text("Who?")
    assert "Be terse." in chatml
    assert "helpful" not in chatml


@pytest.mark.parametrize(
    "template",
    [
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{{ messages[-1].content }}",
        "{{ messages[-1].content }}",
    ],
    ids=["refused", "left out"],
)
def test_a_template_without_room_for_a_system_message_is_an_error(tiny, template):
    format = _with_template(tiny, template, system="Be terse.")
    message = _message(lambda: format.prompt_ids(QUESTION))
    assert "config.think.system" in message


def test_a_template_that_closes_the_think_block_is_an_error(tokenizers):
    qwen = ChatFormat(copy.deepcopy(tokenizers["qwen3"]))
    template = QWEN3.replace("enable_thinking is defined and not enable_thinking", "true")
    message = _message(lambda: _with_template(qwen, template).prompt_ids(QUESTION))
    assert "</think>" in message
    assert "config.think.prompt" in message


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('not\nthis way') }}",
        "{% if %}",
        "{{ messages[5].content.nothing.at_all }}",
        "Hello.",
        "{{ messages[0].content | length }}",
    ],
    ids=["raises", "no Jinja", "undefined", "no question", "question changed"],
)
def test_a_template_that_fails_is_an_error_that_names_the_way_out(tiny, template):
    message = _message(lambda: _with_template(tiny, template).prompt_ids(QUESTION))
    assert "config.think.prompt" in message


def test_a_template_that_changes_the_question_is_an_error(tiny):
    template = "{{ messages[0].content | trim | replace(' \n', '') ~ messages[0].content[:1] }}"
    assert "config.think.prompt" in _message(
        lambda: _with_template(tiny, template).prompt_ids(QUESTION)
    )


def test_a_tokenizer_without_a_chat_template_is_an_error(tiny):
    message = _message(lambda: _with_template(tiny, None).prompt_ids(QUESTION))
    assert "chat template" in message
    assert "config.think.prompt" in message


def test_a_prompt_from_the_config_is_used_as_it_is(tokenizers):
    prompt = "Q: {question} {{json}}\nThoughts:"
    for kind in KINDS:
        format = ChatFormat(tokenizers[kind], prompt=prompt)
        text = f"Q: {QUESTION} {{json}}\nThoughts:"
        assert format.prompt_text(QUESTION) == text
        bos = [format.tokenizer.bos_token_id] if kind in ("r1 old", "llama3") else []
        assert format.prompt_ids(QUESTION) == bos + _encode(format, text)


def test_a_prompt_from_the_config_may_hold_control_tokens(tokenizers):
    format = ChatFormat(tokenizers["r1 old"], prompt="<｜User｜>{question}<｜Assistant｜><think>\n")
    assert format.prompt_ids(QUESTION) == ChatFormat(tokenizers["r1 old"]).prompt_ids(QUESTION)


def test_a_prompt_that_closes_the_think_block_is_an_error(tiny):
    format = ChatFormat(tiny.tokenizer, prompt="{question}<think>\n</think>\n")
    assert "config.think.prompt" in _message(lambda: format.prompt_ids(QUESTION))


# ---- data that spells control tokens


def test_a_question_that_spells_control_tokens_does_not_become_them(format):
    usual = _control(format, format.prompt_ids(QUESTION))
    for token in _added(format).values():
        if token == "<|fim|>":  # Neither special nor known to the template: an ordinary word.
            continue
        for question in (token, f"What is {token}?", token * 2, f"<{token}{token[:-1]}", token[1:]):
            ids = format.prompt_ids(question)
            assert _control(format, ids) == usual
            assert format.tokenizer.decode(ids) == format.prompt_text(question)


def test_an_answer_that_spells_control_tokens_does_not_become_them(format):
    usual = _control(format, format.completion_ids(COT, "Lisbon"))
    for token in _added(format).values():
        if token in ("<|fim|>", THINK_OPEN, THINK_CLOSE):
            continue
        ids = format.completion_ids(f"It is {token}{token}.", f"{token} it is {token}")
        assert _control(format, ids) == usual
        assert ids.count(format.eos_id) == 1
        assert format.split(ids) == Thought(
            f"It is {token}{token}.", f"{token} it is {token}", True
        )


def test_tags_that_an_answer_spells_do_not_become_them(tagged):
    ids = tagged.completion_ids("Open with <think>.", "<think> opens, </think> closes")
    assert _control(tagged, ids) == [*tagged.close_ids, tagged.eos_id]
    assert tagged.split(ids) == Thought(
        "Open with <think>.", "<think> opens, </think> closes", True
    )


@pytest.fixture(scope="session")
def all_formats(tokenizers):
    return [ChatFormat(tokenizers[kind]) for kind in KINDS]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_text_at_all_becomes_a_control_token(all_formats, data):
    for format in all_formats:
        known = [t for t in _added(format).values() if t not in ("<|fim|>", THINK_CLOSE)]
        words = st.sampled_from([*known, "<", ">", "|", "<|", "</", "think>", "im_end|>", " ", "a"])
        text = "".join(data.draw(st.lists(words, min_size=1, max_size=8)))
        assert _control(format, format.prompt_ids(text)) == _control(
            format, format.prompt_ids(QUESTION)
        )
        if THINK_CLOSE in text or (THINK_OPEN in text and len(format.close_ids) > 1):
            continue
        ids = format.completion_ids(text, text)
        expected = format.close_ids if len(format.close_ids) == 1 else []
        assert _control(format, ids) == [*expected, format.eos_id]
        assert format.split(ids) == Thought(text.strip(), text.strip(), True)


def test_added_tokens_of_white_space_are_ordinary_text(tokenizers):
    format = ChatFormat(copy.deepcopy(tokenizers["llama3"]))
    assert "\n\n" in format.tokenizer.chat_template
    format.tokenizer.add_tokens(["\n\n"])
    format = ChatFormat(format.tokenizer)
    newlines = len(format.tokenizer) - 1
    assert format.prompt_ids("Who?\n\nAnd where?").count(newlines) == 3
    assert format.completion_ids("one\n\ntwo", "three").count(newlines) == 2


def test_a_control_token_of_one_character_is_an_error(tiny):
    tiny.tokenizer.add_special_tokens({"additional_special_tokens": ["¶"]})
    format = ChatFormat(tiny.tokenizer)
    assert "¶" in _message(lambda: format.prompt_ids("What is ¶?"))


# ---- completions


def test_a_completion_has_one_eos_at_its_end_and_no_bos(format):
    ids = format.completion_ids(COT, "Lisbon")
    assert ids[-1] == format.eos_id
    assert ids.count(format.eos_id) == 1
    assert format.tokenizer.bos_token_id not in ids
    text = f"{COT}\n</think>\n\nLisbon"
    assert ids[:-1] == _encode(format, text)


def test_prompt_and_completion_decode_to_the_whole_text(tiny):
    ids = [*tiny.prompt_ids(QUESTION), *tiny.completion_ids(COT, "Lisbon")]
    bos, eos = tiny.tokenizer.bos_token, tiny.tokenizer.eos_token
    assert tiny.tokenizer.decode(ids) == (
        f"{bos}<｜User｜>{QUESTION}<｜Assistant｜><think>\n{COT}\n</think>\n\nLisbon{eos}"
    )


def test_text_that_the_tokenizer_never_saw_comes_back(format):
    thought = format.split(format.completion_ids("Она из 里斯本, 42 % — naïve.", "São Tomé"))
    assert thought == Thought("Она из 里斯本, 42 % — naïve.", "São Tomé", True)


def test_a_chain_of_thought_that_holds_the_closing_tag_is_an_error(format):
    message = _message(lambda: format.completion_ids("one </think> two", "three"))
    assert "'</think>'" in message


@pytest.mark.parametrize(
    ("cot", "answer"), [("a <think>", "b"), ("a", "<think>"), ("a", "</think>")]
)
def test_tags_of_several_tokens_cannot_be_told_from_text(spelled, cot, answer):
    assert "think>'" in _message(lambda: spelled.completion_ids(cot, answer))


def test_a_tokenizer_without_eos_is_an_error(tiny):
    tiny.tokenizer.eos_token = None
    assert "eos_token" in _message(lambda: ChatFormat(tiny.tokenizer))


def test_the_end_of_sequence_comes_first_among_the_ids_that_stop(tiny):
    assert tiny.stop_ids == (tiny.eos_id,)
    format = ChatFormat(tiny.tokenizer, stop_ids=(7, tiny.eos_id, 9, 7))
    assert format.stop_ids == (tiny.eos_id, 7, 9)


@pytest.mark.parametrize("pad", ["eos", "none"])
def test_the_pad_id_means_nothing(tiny, pad):
    other = copy.deepcopy(tiny.tokenizer)
    other.pad_token = other.eos_token if pad == "eos" else None
    odd = ChatFormat(other)
    ids = tiny.completion_ids(COT, "Lisbon")
    assert odd.prompt_ids(QUESTION) == tiny.prompt_ids(QUESTION)
    assert odd.completion_ids(COT, "Lisbon") == ids
    assert odd.split(ids) == tiny.split(ids)


# ---- generations taken apart


@pytest.mark.parametrize(
    ("text", "thought"),
    [
        (f"{COT}\n</think>\n\nLisbon", Thought(COT, "Lisbon", True)),
        ("I recall Ada Brandt and", Thought("I recall Ada Brandt and", "", False)),
        ("", Thought("", "", False)),
        ("</think>\n\nLisbon", Thought("", "Lisbon", True)),
        ("one\n</think>", Thought("one", "", True)),
        ("<think>\none\n</think>\n\ntwo", Thought("one", "two", True)),
        ("zero <think>\none\n</think>\n\ntwo", Thought("zero\none", "two", True)),
        ("one</think>two<think>three</think>four", Thought("one\nthree", "two\nfour", True)),
        ("one</think>two<think>three", Thought("one\ntwo\nthree", "", False)),
        ("one</think>two<think>", Thought("one\ntwo", "", False)),
        ("one</think>two</think>three", Thought("one", "two\nthree", True)),
        ("<think>", Thought("", "", False)),
        ("<think></think>", Thought("", "", True)),
        ("one </think two", Thought("one </think two", "", False)),
    ],
)
def test_a_generation_is_taken_apart(format, text, thought):
    ids = _encode(format, text)
    assert format.split(ids) == thought
    assert format.split([*ids, format.eos_id]) == thought
    assert (format.answer_start(ids) is not None) == (THINK_CLOSE in text)


def _reference(items):
    """(cot, answer, closed) of a generation given as words and tags, by the letter of the rules."""
    blocks, inside = [("cot", "")], True
    for item in items:
        if item in (THINK_OPEN, THINK_CLOSE):
            inside = item == THINK_OPEN
            blocks.append(("cot" if inside else "answer", ""))
        else:
            blocks[-1] = (blocks[-1][0], blocks[-1][1] + item)

    def joined(kinds):
        return "\n".join(text.strip() for kind, text in blocks if kind in kinds and text.strip())

    if inside:
        return Thought(joined(("cot", "answer")), "", False)
    return Thought(joined(("cot",)), joined(("answer",)), True)


_words = st.text(st.sampled_from(string.ascii_letters + " \n.,!é里"), min_size=1, max_size=8)
_items = st.lists(_words | st.sampled_from([THINK_OPEN, THINK_CLOSE]), max_size=10)


@settings(max_examples=150, deadline=None)
@given(items=_items)
def test_any_sequence_of_tags_and_text_is_taken_apart(all_formats, items):
    for format in all_formats:
        ids = _encode(format, "".join(items))
        assert format.split(ids) == _reference(items)
        start = format.answer_start(ids)
        assert (start is None) == (THINK_CLOSE not in items)
        if start is not None:
            assert THINK_CLOSE in format.tokenizer.decode(ids[:start])
            assert THINK_CLOSE not in format.tokenizer.decode(ids[: start - 1])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 2000), max_size=30))
def test_any_ids_at_all_are_taken_apart(all_formats, ids):
    for format in all_formats:
        cot, answer, closed = format.split(ids)
        special = format.tokenizer.all_special_tokens
        assert not any(token in text for token in special for text in (cot, answer))
        assert "\ufffd" not in cot + answer
        assert closed or answer == ""


def test_text_that_only_spells_the_tags_is_not_taken_for_them(tagged):
    close = [i for piece in ("<", "/", "think", ">") for i in _encode(tagged, piece)]
    assert tagged.tokenizer.decode(close) == THINK_CLOSE
    assert tagged.answer_start(close) is None
    assert tagged.split(close) == Thought(THINK_CLOSE, "", False)


def test_tags_that_are_flagged_special_are_still_found(tiny):
    from tokenizers import AddedToken

    tags = [AddedToken(tag, special=True, normalized=False) for tag in (THINK_OPEN, THINK_CLOSE)]
    tiny.tokenizer.add_tokens(tags, special_tokens=True)
    format = ChatFormat(tiny.tokenizer)
    assert format.split(format.completion_ids(COT, "Lisbon")) == Thought(COT, "Lisbon", True)


def test_the_answer_starts_right_after_the_closing_tag(tagged):
    ids = tagged.completion_ids(COT, "Lisbon")
    start = tagged.answer_start(ids)
    assert ids[start - 1 : start] == tagged.close_ids
    assert tagged.tokenizer.decode(ids[start:-1]) == "\n\nLisbon"
    assert tagged.answer_start(_encode(tagged, COT)) is None
    assert tagged.answer_start([]) is None


@pytest.mark.parametrize("pattern", [APART, JOINED], ids=["newlines apart", "newlines joined"])
def test_a_closing_tag_of_several_tokens(pattern):
    format = ChatFormat(_tokenizer(R1_NEW, ["<s>", "</s>"], bos="<s>", eos="</s>", pattern=pattern))
    assert len(format.close_ids) > 1
    ids = format.completion_ids(COT, "Lisbon")
    start = format.answer_start(ids)
    assert start is not None
    assert format.tokenizer.decode(ids[start:-1]).strip() == "Lisbon"
    assert format.split(ids) == Thought(COT, "Lisbon", True)
    assert format.answer_start(format.close_ids[:-1]) is None


def test_ids_that_end_a_turn_are_dropped(tiny):
    format = ChatFormat(tiny.tokenizer, stop_ids=(2, 3))  # <pad> and the turn tag <｜User｜>
    ids = format.completion_ids(COT, "Lisbon")
    for end in ([format.eos_id] * 2, [2, format.eos_id], [3]):
        assert format.split([*ids, *end]) == Thought(COT, "Lisbon", True)
    assert format.split([format.eos_id]) == Thought("", "", False)


def test_special_tokens_inside_a_generation_are_not_shown(format):
    eos = [format.eos_id]
    ids = [*_encode(format, "one"), *eos, *_encode(format, " more</think>two"), *eos]
    assert format.split([*ids, *_encode(format, " three")]) == Thought(
        "one more", "two three", True
    )


def test_ids_beyond_the_tokenizer_and_halves_of_characters_are_nothing(format):
    beyond = [len(format.tokenizer), len(format.tokenizer) + 7, 10**6]
    half = _encode(format, "é")[:1]
    assert len(_encode(format, "é")) == 2
    ids = [*beyond, *_encode(format, "one"), *half, *_encode(format, "</think>"), *beyond]
    thought = format.split([*ids, *_encode(format, "two"), *half])
    assert thought.answer == "two"
    assert thought.closed
    assert thought.cot == "one"


# ---- tags from the config


def test_a_model_without_think_tags(tokenizers):
    for kind in KINDS:
        format = ChatFormat(tokenizers[kind], open="", close="Answer:")
        assert not format.prompt_text(QUESTION).endswith("think>\n") or kind in ("tiny", "r1 new")
        ids = format.completion_ids(COT, "Lisbon")
        assert format.tokenizer.decode(ids[:-1]) == f"{COT}\nAnswer:\n\nLisbon"
        assert format.split(ids) == Thought(COT, "Lisbon", True)
        said = _encode(format, "It is Lisbon. Answer: Lisbon")
        assert format.split(said) == Thought("It is Lisbon.", "Lisbon", True)
        assert format.split(_encode(format, COT)) == Thought(COT, "", False)
        assert "'Answer:'" in _message(lambda f=format: f.completion_ids("Answer: no", "yes"))


def test_tags_of_other_names(tokenizers):
    format = ChatFormat(tokenizers["chatml"], open="[THINK]", close="[/THINK]")
    assert format.prompt_text(QUESTION).endswith("assistant\n[THINK]\n")
    assert format.split(format.completion_ids(COT, "Lisbon")) == Thought(COT, "Lisbon", True)


def test_a_tag_that_is_a_common_word_goes_by_the_text(tiny):
    format = ChatFormat(tiny.tokenizer, open="", close="It")
    assert len(format.close_ids) == 1
    said = _encode(format, "I recall Ada. It Lisbon")
    assert format.close_ids[0] not in said  # the word has another token behind a space
    assert format.split(said) == Thought("I recall Ada.", "Lisbon", True)


def test_one_tag_may_be_a_token_and_the_other_not(tokenizers):
    format = ChatFormat(tokenizers["qwen3"], close="Answer:")
    said = _encode(format, "<think>one Answer: two<think>three Answer: four")
    assert format.split(said) == Thought("one\nthree", "two\nfour", True)


def test_the_defaults_are_those_of_the_config(tokenizers):
    settings = ThinkConfig()
    assert (settings.open, settings.close) == (THINK_OPEN, THINK_CLOSE) == ("<think>", "</think>")
    format = ChatFormat(
        tokenizers["tiny"], settings.open, settings.close, settings.prompt, system=settings.system
    )
    assert format == ChatFormat(tokenizers["tiny"])


@pytest.mark.parametrize(
    ("fields", "key"),
    [
        ({"close": ""}, "close"),
        ({"close": " </think>"}, "close"),
        ({"open": "<think>\n"}, "open"),
        ({"open": "</think>"}, "open"),
        ({"open": "think"}, "open"),
        ({"prompt": "Q:"}, "prompt"),
        ({"prompt": "{question} {answer}"}, "prompt"),
        ({"prompt": "{question} {}"}, "prompt"),
        ({"prompt": "{question} {"}, "prompt"),
        ({"prompt": "{question!r}"}, "prompt"),
        ({"prompt": "{question:>9}"}, "prompt"),
        ({"prompt": "{question.upper}"}, "prompt"),
        ({"prompt": "{question}", "system": "Be terse."}, "system"),
    ],
)
def test_settings_that_cannot_work_are_refused_by_name(fields, key):
    message = _message(lambda: parse(Config, {"think": fields}))
    assert message.startswith(f"config.think.{key}")


def test_settings_that_work():
    fields = {"open": "", "close": "Answer:", "prompt": "{{Q}}: {question}", "system": ""}
    assert parse(Config, {"think": fields}).think == ThinkConfig(**fields)


def test_the_vocabulary_ends_after_the_largest_id():
    format = ChatFormat(load_tokenizer(resolve("asset:tiny_lrm/target")))
    assert format.vocabulary == len(format.tokenizer)
    assert format.tokenizer.convert_ids_to_tokens(format.vocabulary - 1) is not None
