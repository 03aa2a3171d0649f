"""Distance of a model from the retrained one, which never saw the forget set."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

from cipo_jax.data.batches import PadShape, TokenizedExample
from cipo_jax.evals.evaluate import Question
from cipo_jax.text.chat_format import ChatFormat
from cipo_jax.training.scoring import Scorer
from cipo_jax.typing import Params


def truth_ratios(
    scorer: Scorer, params: Params, chat_format: ChatFormat, questions: Sequence[Question]
) -> np.ndarray:
    """TOFU's truth ratio of each question that has wrong answers (arXiv 2401.06121, section 2.2.2).

    ``R = exp(mean_k l(wrong_k)) / exp(l(right))`` with l the mean log-probability of the tokens of
    the completion: chain of thought and answer, where a wrong answer replaces the right one in
    both. The mean over wrong answers is geometric.

    Args:
      scorer: of the model.
      params: the model.
      chat_format: of the model.
      questions: those without `perturbed_answers` are skipped.

    Returns:
      [questions with `perturbed_answers`], above 0; above 1 where wrong answers are more likely.
    """
    rows, counts = [], []
    for _, example, prompt in questions:
        if not example.perturbed_answers:
            continue
        cot = example.cot or ""
        right = example.paraphrased_answer or example.answer
        rows.append(TokenizedExample(prompt, chat_format.completion_ids(cot, right)))
        for wrong in example.perturbed_answers:
            swapped = cot.replace(example.answer, wrong)
            rows.append(TokenizedExample(prompt, chat_format.completion_ids(swapped, wrong)))
        counts.append(1 + len(example.perturbed_answers))
    if not rows:
        return np.zeros(0)
    means = [
        float(logps.mean()) for logps in scorer.token_logps(params, rows, PadShape.fitting(rows))
    ]
    ratios, at = [], 0
    for count in counts:
        right, *wrong = means[at : at + count]
        ratios.append(np.exp(np.mean(wrong) - right))
        at += count
    return np.array(ratios)


def forget_quality(ratios: np.ndarray, retrained: np.ndarray) -> float:
    """p-value of the two-sample Kolmogorov-Smirnov test between truth ratios (TOFU).

    Near 1 where the two are indistinguishable; nan where one of them is empty.
    """
    if not (len(ratios) and len(retrained)):
        return float("nan")
    tested: Any = stats.ks_2samp(ratios, retrained)
    return float(tested.pvalue)


def divergence(
    scorer: Scorer, params: Params, retrained: Params, rows: Sequence[TokenizedExample]
) -> float:
    """Mean KL(retrained || model) over the tokens of completions, in nats per token.

    Args:
      scorer: of models of this shape.
      params: the model.
      retrained: the retrained model.
      rows: prompts with the completions that the retrained model generates.
    """
    values = scorer.divergences(params, retrained, rows, PadShape.fitting(rows))
    return float(np.concatenate(values).mean())
