"""How far a model is from the one that never saw what was to be forgotten."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

from cipo_jax.data.batches import TokenizedExample, shape_of
from cipo_jax.data.examples import Example
from cipo_jax.text.chat_format import ChatFormat
from cipo_jax.training.scoring import Scorer
from cipo_jax.typing import Params


def truth_ratios(
    scorer: Scorer, params: Params, format: ChatFormat, examples: Sequence[Example]
) -> np.ndarray:
    """TOFU's truth ratio of each example that has wrong answers (arXiv 2401.06121, section 2.2.2).

    ``R = exp(mean_k l(wrong_k)) / exp(l(right))`` with l the mean log-probability of a token of the
    completion: thought and answer, where a wrong answer takes the right one's place in both. The
    mean over wrong answers is geometric.

    Returns:
      [examples with `perturbed_answers`], above 0; above 1 where wrong answers are likelier.
    """
    rows, counts = [], []
    for example in examples:
        if not example.perturbed_answers:
            continue
        prompt, cot = format.prompt_ids(example.question), example.cot or ""
        right = example.paraphrased_answer or example.answer
        rows.append(TokenizedExample(prompt, format.completion_ids(cot, right)))
        for wrong in example.perturbed_answers:
            swapped = cot.replace(example.answer, wrong)
            rows.append(TokenizedExample(prompt, format.completion_ids(swapped, wrong)))
        counts.append(1 + len(example.perturbed_answers))
    if not rows:
        return np.zeros(0)
    means = [float(logps.mean()) for logps in scorer.token_logps(params, rows, shape_of(rows))]
    ratios, at = [], 0
    for count in counts:
        right, *wrong = means[at : at + count]
        ratios.append(np.exp(np.mean(wrong) - right))
        at += count
    return np.array(ratios)


def forget_quality(ratios: np.ndarray, retrained: np.ndarray) -> float:
    """p-value of the two-sample Kolmogorov-Smirnov test between truth ratios (TOFU).

    Near 1 where the model cannot be told from the retrained one; nan where there are none.
    """
    if not (len(ratios) and len(retrained)):
        return float("nan")
    tested: Any = stats.ks_2samp(ratios, retrained)
    return float(tested.pvalue)


def divergence(
    scorer: Scorer, params: Params, retrained: Params, rows: Sequence[TokenizedExample]
) -> float:
    """Mean KL(retrained || model) over the tokens of completions, in nats a token.

    Args:
      scorer: of models of this shape.
      params: the model.
      retrained: the model that never saw what was to be forgotten.
      rows: prompts and what the retrained model says to them.
    """
    values = scorer.divergences(params, retrained, rows, shape_of(rows))
    return float(np.concatenate(values).mean())
