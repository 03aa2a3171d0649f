"""Runs whose model is not asked: its completions and log-probabilities are given."""

import dataclasses
from types import SimpleNamespace

import numpy as np

from cipo_jax.config import Config
from cipo_jax.evals.evaluate import encode_questions
from cipo_jax.progress import Reporter
from cipo_jax.runs.context import Run
from cipo_jax.runs.data import ForgetSet
from cipo_jax.sampling.job import Completion

MODEL = "the model"  # In place of its parameters.


@dataclasses.dataclass(frozen=True)
class FakeModel:
    """As much of a language model as stages look at."""

    chat: object
    fingerprint: str = "model"

    def init_trainable(self, key):
        return {}

    def assemble(self, trained):
        return MODEL


class FakeSampler:
    """Gives texts in place of samples, and keeps the jobs that it got.

    `says` is called with a job, a request and the number of the sample, and returns a text; a text
    that ends in "..." is cut off by the limit of tokens.
    """

    def __init__(self, chat, says):
        self.chat, self.says, self.jobs = chat, says, []

    def prepare(self, params):
        assert params == MODEL
        return params

    def stream_requests(self, decoding, job):
        assert decoding == MODEL
        self.jobs.append(job)
        for index, request in enumerate(job.requests):
            drawn = []
            for sample in range(job.num_samples):
                text = self.says(job, request, sample)
                stop = "length" if text.endswith("...") else "id"
                ids = self.chat.text_ids(text)
                drawn.append(Completion(request.item, sample, ids, [], [], stop, 0.0))
            yield index, drawn


class FakeScorer:
    """Gives `logp(prompt, completion)`, a list of numbers, for each completion."""

    def __init__(self, logp):
        self.logp, self.calls = logp, []

    def token_logps(self, params, rows, shape):
        assert params == MODEL
        self.calls.append((list(rows), shape))
        return [np.array(self.logp(list(r.prompt), list(r.completion))) for r in rows]


def never(*args):
    raise AssertionError("the model is asked")


def open_fake_run(folder, chat, examples, config=None, says=never, logp=never):
    """A run over forget examples."""
    questions = encode_questions(chat, {"forget": examples})
    workspace = SimpleNamespace(
        model=FakeModel(chat),
        data=SimpleNamespace(forget=ForgetSet(questions)),
        sampler=FakeSampler(chat, says),
        scorer=FakeScorer(logp),
    )
    return Run.open(config or Config(), folder, workspace, Reporter(quiet=True), claim=False)
