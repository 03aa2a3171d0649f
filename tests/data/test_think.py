import copy

import pytest

from cipo_jax.data.think import THINK_CLOSE, THINK_OPEN, ThinkFormat, Thought
from cipo_jax.data.tiny_tokenizer import CHAT_TEMPLATE, train_tokenizer
from cipo_jax.data.tiny_world import make_world, training_example
from cipo_jax.errors import UserError

QUESTION = "Where was Ada Brandt born?"
COT = "I recall Ada Brandt. Ada Brandt was born in Lisbon. So it is Lisbon."


def _texts():
    world = make_world(0, 60, 16)
    examples = [training_example(world, world.people, 0, i) for i in range(300)]
    return [text for e in examples for text in (e.question, e.cot, e.answer)]


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer(_texts(), 600)


@pytest.fixture
def format(tokenizer):
    return ThinkFormat(copy.deepcopy(tokenizer))


def _plain_tokenizer(pattern):
    """One to which the think tags are ordinary text; `pattern` cuts text into pretokens."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
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
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = _texts()
    tagged = [f"<think>\n{text}\n</think>\n\n{text}" for text in texts]
    tokenizer.train_from_iterator(tagged, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def test_a_prompt_has_one_bos_and_no_eos(format):
    ids = format.prompt_ids(QUESTION)
    assert ids[0] == format.tokenizer.bos_token_id
    assert ids.count(format.tokenizer.bos_token_id) == 1
    assert format.eos_id not in ids


def test_a_completion_has_one_eos_at_its_end_and_no_bos(format):
    ids = format.completion_ids(COT, "Lisbon")
    assert ids[-1] == format.eos_id
    assert ids.count(format.eos_id) == 1
    assert format.tokenizer.bos_token_id not in ids


def test_a_prompt_ends_in_an_opened_think_block(format):
    text = format.prompt_text(QUESTION)
    assert text.rstrip().endswith(THINK_OPEN)
    assert text.count(THINK_OPEN) == 1
    assert QUESTION in text
    assert THINK_CLOSE not in text


def test_prompt_and_completion_decode_to_the_whole_text(format):
    ids = [*format.prompt_ids(QUESTION), *format.completion_ids(COT, "Lisbon")]
    bos, eos = format.tokenizer.bos_token, format.tokenizer.eos_token
    assert format.tokenizer.decode(ids) == (
        f"{bos}<｜User｜>{QUESTION}<｜Assistant｜><think>\n{COT}\n</think>\n\nLisbon{eos}"
    )


def test_text_that_the_tokenizer_never_saw_comes_back(format):
    thought = format.split(format.completion_ids("Она из 里斯本, 42 % — naïve.", "São Tomé"))
    assert thought == Thought("Она из 里斯本, 42 % — naïve.", "São Tomé", True)


def test_a_completion_is_taken_apart(format):
    assert format.split(format.completion_ids(COT, "Lisbon")) == Thought(COT, "Lisbon", True)


def test_a_generation_without_the_closing_tag_is_all_thought(format):
    ids = format._encode("I recall Ada Brandt and")
    assert format.split(ids) == Thought("I recall Ada Brandt and", "", False)


def test_a_generation_is_cut_at_the_first_of_two_closing_tags(format):
    ids = format._encode("one\n</think>\n\ntwo\n</think>\n\nthree")
    cot, answer, closed = format.split(ids)
    assert (cot, closed) == ("one", True)
    assert answer.startswith("two")
    assert answer.endswith("three")


def test_an_empty_thought_and_an_empty_answer(format):
    assert format.split(format._encode("</think>\n\nLisbon")) == Thought("", "Lisbon", True)
    assert format.split(format._encode("one\n</think>")) == Thought("one", "", True)
    assert format.split([]) == Thought("", "", False)
    assert format.split([format.eos_id]) == Thought("", "", False)


def test_a_think_tag_that_the_model_repeats_is_no_part_of_the_thought(format):
    ids = format._encode("<think>\nI recall Ada Brandt.\n</think>\n\nLisbon")
    assert format.split(ids) == Thought("I recall Ada Brandt.", "Lisbon", True)


def test_trailing_eos_are_dropped(format):
    ids = format.completion_ids(COT, "Lisbon")
    assert format.split([*ids, format.eos_id, format.eos_id]) == format.split(ids[:-1])


def test_the_answer_starts_right_after_the_closing_tag(format):
    ids = format.completion_ids(COT, "Lisbon")
    start = format.answer_start(ids)
    assert ids[start - len(format.close_ids) : start] == format.close_ids
    assert format.tokenizer.decode(ids[start:-1]) == "\n\nLisbon"
    assert format.answer_start(format._encode(COT)) is None
    assert format.answer_start([]) is None
    assert format.answer_start(format.close_ids[:-1]) is None


def test_text_that_only_spells_the_closing_tag_is_not_taken_for_it(format):
    spelled = [i for piece in ("<", "/", "think", ">") for i in format._encode(piece)]
    assert format.tokenizer.decode(spelled) == THINK_CLOSE
    assert format.answer_start(spelled) is None


@pytest.mark.parametrize("pad", ["eos", "none"])
def test_the_pad_id_means_nothing(tokenizer, pad):
    other = copy.deepcopy(tokenizer)
    other.pad_token = other.eos_token if pad == "eos" else None
    usual, odd = ThinkFormat(tokenizer), ThinkFormat(other)
    ids = usual.completion_ids(COT, "Lisbon")
    assert odd.prompt_ids(QUESTION) == usual.prompt_ids(QUESTION)
    assert odd.completion_ids(COT, "Lisbon") == ids
    assert odd.split(ids) == usual.split(ids)


def test_a_template_that_does_not_open_the_think_block_gets_it_opened(format):
    usual = format.prompt_ids(QUESTION)
    format.tokenizer.chat_template = CHAT_TEMPLATE.replace("<think>\n", "")
    closed = ThinkFormat(format.tokenizer)
    assert closed.prompt_text(QUESTION).endswith("<｜Assistant｜><think>\n")
    assert closed.prompt_ids(QUESTION) == usual


def test_a_template_that_opens_it_without_a_newline_is_left_alone(format):
    format.tokenizer.chat_template = CHAT_TEMPLATE.replace("<think>\n", "<think>")
    assert ThinkFormat(format.tokenizer).prompt_text(QUESTION).endswith("<｜Assistant｜><think>")


def test_a_question_that_speaks_of_the_tag_does_not_pass_for_an_opened_block(format):
    format.tokenizer.chat_template = "{{ messages[0]['content'] }}"
    text = ThinkFormat(format.tokenizer).prompt_text("What is <think>")
    assert text == "What is <think><think>\n"


def test_a_tokenizer_without_a_chat_template_is_an_error(format):
    format.tokenizer.chat_template = None
    with pytest.raises(UserError, match="chat template"):
        ThinkFormat(format.tokenizer).prompt_ids(QUESTION)


def test_a_tokenizer_without_eos_is_an_error(format):
    format.tokenizer.eos_token = None
    with pytest.raises(UserError, match="eos_token"):
        ThinkFormat(format.tokenizer).completion_ids(COT, "Lisbon")


@pytest.mark.parametrize(
    "pattern",
    [
        r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+",
        # A pretoken may take the newlines that follow punctuation, as in many recent tokenizers.
        r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+",
    ],
    ids=["newlines apart", "newlines joined"],
)
def test_a_closing_tag_of_several_tokens(pattern):
    format = ThinkFormat(_plain_tokenizer(pattern))
    assert len(format.close_ids) > 1
    ids = format.completion_ids(COT, "Lisbon")
    start = format.answer_start(ids)
    assert start is not None
    assert format.tokenizer.decode(ids[start:-1]).strip() == "Lisbon"
    assert format.split(ids) == Thought(COT, "Lisbon", True)
    # What a model generates is tokenised as a whole.
    said = format.tokenizer.encode(f"{COT}\n</think>\n\nLisbon", add_special_tokens=False)
    assert format.split(said) == Thought(COT, "Lisbon", True)
    assert not format.split(format._encode(COT)).closed
