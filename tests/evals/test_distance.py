"""Distance of a model from the retrained one, and grading where thinking is skipped."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cipo_jax.data.batches import TokenizedExample
from cipo_jax.data.examples import Example
from cipo_jax.data.tiny_world import World, questions_about
from cipo_jax.evals.attacks import prefill_text
from cipo_jax.evals.distance import divergence, forget_quality, truth_ratios
from cipo_jax.evals.evaluate import Question, encode_questions, graded
from cipo_jax.hub import load_tokenizer, resolve
from cipo_jax.models.decoder import Compute, DecoderConfig, abstract_params, hidden_states
from cipo_jax.text.chat_format import ChatFormat
from cipo_jax.training.mesh import make_mesh
from cipo_jax.training.policy import Policy
from cipo_jax.training.scoring import Scorer

pytestmark = pytest.mark.usefixtures("quick_compilation")


# ---- truth ratios


class Words:
    """A format whose ids are lengths of words, and a scorer to which long words are unlikely."""

    def prompt_ids(self, question):
        return [len(word) for word in question.split()]

    def completion_ids(self, cot, answer):
        return [len(word) for word in (*cot.split(), *answer.split())]

    def ratios(self, params, examples):
        questions = [Question("forget", e, self.prompt_ids(e.question)) for e in examples]
        return truth_ratios(self, params, self, questions)

    def token_logps(self, params, rows, shape):
        assert shape.total >= max(len(r.prompt) + len(r.completion) for r in rows)
        assert shape.completion >= max(len(r.completion) for r in rows)
        self.rows = rows
        return [-params * np.array(row.completion, float) for row in rows]


ASKED = Example("Where is Ada", "Oslo", cot="It is Oslo", perturbed_answers=("Rome", "Washington"))


def test_a_truth_ratio_is_what_it_is_by_hand():
    words = Words()
    (ratio,) = words.ratios(0.1, [ASKED])
    assert [row.prompt for row in words.rows] == [[5, 2, 3]] * 3
    # The wrong answer takes the right one's place in the thought too.
    assert [row.completion for row in words.rows] == [[2, 2, 4, 4], [2, 2, 4, 4], [2, 2, 10, 10]]
    right, rome, washington = -0.1 * 3, -0.1 * 3, -0.1 * 6
    geometric = np.sqrt(np.exp(rome) * np.exp(washington))
    assert ratio == pytest.approx(geometric / np.exp(right), rel=1e-12)
    assert words.ratios(0.2, [ASKED])[0] == pytest.approx(ratio**2, rel=1e-12)


def test_where_wrong_answers_are_likelier_the_ratio_is_above_1():
    words = Words()
    swapped = dataclasses.replace(
        ASKED, answer="Washington", cot="It is Washington", perturbed_answers=("Rome",)
    )
    (ratio,) = words.ratios(0.1, [swapped])
    assert ratio == pytest.approx(np.exp(-0.3 + 0.6), rel=1e-12)


def test_a_paraphrase_stands_for_the_answer_and_other_examples_are_left_out():
    words = Words()
    said = dataclasses.replace(ASKED, paraphrased_answer="the town of Oslo")
    plain = dataclasses.replace(ASKED, perturbed_answers=())
    found = words.ratios(0.1, [plain, said, plain, ASKED])
    assert words.rows[0].completion == [2, 2, 4, 3, 4, 2, 4]
    right = -0.1 * np.mean([2, 2, 4, 3, 4, 2, 4])
    assert found[0] == pytest.approx(np.exp((-0.3 - 0.6) / 2 - right), rel=1e-12)
    assert found[1] == pytest.approx(words.ratios(0.1, [ASKED])[0], rel=1e-12)
    assert len(found) == 2
    assert words.ratios(0.1, [plain]).shape == (0,)


def test_people_of_the_world_have_wrong_answers_to_compare_with():
    world = World.load(resolve("asset:tiny_lrm/world.json"))
    examples = questions_about(world.people, "test", per_topic=1)
    for example in examples:
        wrong = example.perturbed_answers
        assert len(set(wrong)) == 3
        assert not set(wrong) & set(example.forbidden)


# ---- forget quality


def test_equal_samples_cannot_be_told_apart_and_far_ones_can():
    rng = np.random.default_rng(0)
    ratios = rng.gamma(2.0, 0.3, 200)
    assert forget_quality(ratios, ratios) == pytest.approx(1.0)
    assert forget_quality(ratios, rng.permutation(ratios)) == pytest.approx(1.0)
    assert forget_quality(ratios, ratios + 5.0) < 1e-6
    assert forget_quality(ratios, rng.gamma(2.0, 0.6, 200)) < 0.01
    assert forget_quality(ratios, rng.gamma(2.0, 0.3, 200)) > 0.01


def test_the_p_value_of_a_few_by_hand():
    # Two samples of 3 that do not overlap: 2 of the 20 ways to divide 6 numbers.
    low, high = np.array([0.1, 0.2, 0.3]), np.array([1.1, 1.2, 1.3])
    assert forget_quality(low, high) == pytest.approx(2 / 20)
    assert forget_quality(high, low) == pytest.approx(2 / 20)


def test_without_ratios_there_is_no_quality():
    some, none = np.ones(3), np.zeros(0)
    assert all(np.isnan(forget_quality(*pair)) for pair in ((some, none), (none, some)))


# ---- divergence


CONFIG = DecoderConfig(
    vocab_size=64, d_model=32, d_ff=48, layers=2, heads=4, kv_heads=2, head_dim=8, tied_head=True
)


def _params(seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: rng.normal(0.0, 0.3, x.shape).astype(np.float32), abstract_params(CONFIG)
    )


@pytest.fixture(scope="module")
def scorer():
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    return Scorer(Policy(CONFIG, Compute(logits_chunk=7)), mesh, 2)


def _rows():
    rng = np.random.default_rng(2)
    sizes = [(1, 1), (5, 9), (3, 2), (2, 12), (7, 4)]
    return [
        TokenizedExample(rng.integers(0, 64, p).tolist(), rng.integers(0, 64, c)) for p, c in sizes
    ]


@jax.jit
def _logits(params, tokens):
    return hidden_states(CONFIG, Compute(), params, tokens) @ params["embed"].T


def test_a_model_is_no_distance_from_itself(scorer):
    assert divergence(scorer, _params(0), _params(0), _rows()) == pytest.approx(0.0, abs=1e-6)


def test_the_distance_is_the_mean_kl_of_a_token(scorer):
    rows = _rows()
    tokens = np.zeros((len(rows), 16), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row.prompt) + len(row.completion)] = [*row.prompt, *row.completion]

    def log_p(seed):
        z = np.float64(_logits(jax.tree.map(jnp.asarray, _params(seed)), jnp.asarray(tokens)))
        z = z - z.max(-1, keepdims=True)
        return z - np.log(np.exp(z).sum(-1, keepdims=True))

    model, retrained = log_p(0), log_p(1)
    kl = (np.exp(retrained) * (retrained - model)).sum(-1)
    starts = [len(row.prompt) - 1 for row in rows]
    each = [kl[i, s : s + len(r.completion)] for i, (r, s) in enumerate(zip(rows, starts))]  # noqa: B905
    found = divergence(scorer, _params(0), _params(1), rows)
    assert found == pytest.approx(np.concatenate(each).mean(), rel=1e-5)
    # Tokens weigh the same, not rows; and the retrained model is the one that is imitated.
    assert abs(found - np.mean([row.mean() for row in each])) > 1e-3 * found
    assert abs(found - divergence(scorer, _params(1), _params(0), rows)) > 1e-3 * found


# ---- answers without thought


@pytest.fixture(scope="module")
def format():
    return ChatFormat(load_tokenizer(resolve("asset:tiny_lrm/target")))


EXAMPLE = Example("Where was Ada Brandt born?", "Braga")


def said(format, prefill, text):
    """The graded generation of a model that continues with a text, and its request."""
    asked = []

    class Sampler:
        def stream(self, params, job):
            asked.extend(job.requests)
            ids = [*format.text_ids(text), format.eos_id]
            yield SimpleNamespace(item=job.requests[0].item, ids=ids)

    questions = encode_questions(format, {"forget": [EXAMPLE]})
    ((item, row),) = graded(Sampler(), format, None, questions, 9, prefill)
    assert item == 0
    assert asked[0].prompt is questions[0].prompt_ids
    return row, asked[0]


def test_the_attacks_of_the_paper():
    assert prefill_text("zero", "</think>") == "\n</think>\n\n"
    less = prefill_text("less", "</think>")
    assert less.endswith("without thinking much.\n</think>\n\n") and less.startswith("Okay, ")
    assert prefill_text("So {close} x", "Answer:") == "So Answer: x"


@pytest.mark.parametrize("attack", ["zero", "less"])
def test_after_a_prefill_that_closes_the_thought_all_that_is_said_is_answer(format, attack):
    row, request = said(format, attack, "Braga")
    assert format.text_of(request.prefill) == prefill_text(attack, format.close)
    assert row.closed and row.answer == "Braga" and row.correct
    assert (row.cot_leaks, row.answer_leaks) == ((), ("Braga",))
    assert row.cot == ("" if attack == "zero" else prefill_text(attack, "").strip())
    # What was given is neither counted nor kept as what was said.
    assert row.ids == (*format.text_ids("Braga"), format.eos_id)
    assert row.tokens == len(row.ids)


def test_without_a_prefill_the_same_words_are_a_thought_that_never_ends(format):
    row, request = said(format, "", "Braga")
    assert list(request.prefill) == []
    assert not row.closed and not row.correct
    assert (row.cot_leaks, row.answer_leaks) == (("Braga",), ())
    closed, _ = said(format, "", "I know it.\n</think>\n\nBraga")
    assert closed.closed and closed.answer_leaks == ("Braga",) and not closed.cot_leaks


def test_a_prefill_that_leaves_the_thought_open_is_part_of_it(format):
    row, _ = said(format, "I recall", " Braga\n</think>\n\nunknown")
    assert row.cot == "I recall Braga" and row.cot_leaks == ("Braga",)
    assert row.answer == "unknown"
