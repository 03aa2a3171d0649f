"""Unlearning losses on log-probabilities: what is to be forgotten is made less likely.

Token log-probabilities are [B, C] in nats, of the tokens of completions, beside a mask [B, C] that
is true where a token counts: the span to act on (chain of thought, answer, or both) is a matter of
the mask. Masked entries may hold anything, NaN included. Every loss is to be minimized, so those
that push a likelihood down are increasing in it. Of a micro-batch, `num_tokens` and `num_sequences`
are the counts of the whole batch divided by the number of micro-batches; None counts the mask.
"""

import jax
import jax.numpy as jnp

from cipo_jax.losses._shared import Metrics, token_mean
from cipo_jax.losses.likelihood import nll
from cipo_jax.losses.preference import dpo


def ga(
    token_logps: jax.Array, mask: jax.Array, *, num_tokens: jax.Array | None = None
) -> tuple[jax.Array, Metrics]:
    """Gradient ascent on the NLL (Jang et al. 2023, arXiv 2210.01504).

    ``mean log p`` over tokens: the NLL with its sign turned. Unbounded below: it ruins a model.

    Args:
      token_logps: [B, C] log-probabilities of the tokens to forget.
      mask: [B, C], true where a token counts.
      num_tokens: [] divisor of the mean.

    Returns:
      The loss, and {"forget/nll"}.
    """
    loss = token_mean(token_logps, mask, num_tokens)
    return loss, {"forget/nll": -loss}


def grad_diff(
    forget_logps: jax.Array,
    forget_mask: jax.Array,
    retain_logps: jax.Array,
    retain_mask: jax.Array,
    *,
    gamma: float = 1.0,
    alpha: float = 1.0,
    forget_num_tokens: jax.Array | None = None,
    retain_num_tokens: jax.Array | None = None,
) -> tuple[jax.Array, Metrics]:
    """Gradient difference (Liu et al. 2022, arXiv 2203.12817; TOFU, arXiv 2401.06121).

    ``gamma * mean log p(forget) - alpha * mean log p(retain)``, each over its tokens.

    Args:
      forget_logps: [B, C] token log-probabilities to push down.
      forget_mask: [B, C], true where a token counts.
      retain_logps: [B', C'] token log-probabilities to keep up.
      retain_mask: [B', C'], true where a token counts.
      gamma: weight of what is forgotten.
      alpha: weight of what is kept.
      forget_num_tokens: [] divisor of the first mean.
      retain_num_tokens: [] divisor of the second mean.

    Returns:
      The loss, and {"forget/nll", "retain/nll"}.
    """
    forget, metrics = ga(forget_logps, forget_mask, num_tokens=forget_num_tokens)
    retain, _ = nll(retain_logps, retain_mask, "token", num_tokens=retain_num_tokens)
    return gamma * forget + alpha * retain, metrics | {"retain/nll": retain}


def npo(logps: jax.Array, ref_logps: jax.Array, *, beta: float = 0.1) -> tuple[jax.Array, Metrics]:
    """Negative preference optimization (Zhang et al. 2024, arXiv 2404.05868, eq. 3).

    ``-(2/b) log sigmoid( -b [log p(y) - log p_ref(y)] )``: DPO without a chosen completion. With
    b -> 0 it is gradient ascent; with b > 0 it is bounded below by 0.

    Args:
      logps: [B] log-probability of each completion to forget, summed over its tokens.
      ref_logps: [B] the same under the reference.
      beta: strength of the pull towards the reference, > 0.

    Returns:
      The mean loss, and {"forget/logratio"}.
    """
    ratio = logps - jax.lax.stop_gradient(ref_logps)
    loss = -(2.0 / beta) * jnp.mean(jax.nn.log_sigmoid(-beta * ratio))
    return loss, {"forget/logratio": jnp.mean(ratio)}


def simnpo(
    logps: jax.Array, lengths: jax.Array, *, beta: float = 4.5, delta: float = 0.0
) -> tuple[jax.Array, Metrics]:
    """NPO without a reference, on the mean over tokens (Fan et al. 2024, arXiv 2410.07163, eq. 4).

    ``-(2/b) log sigmoid( -(b/|y|) log p(y) - b d )``; d is the margin of the NLL per token, as
    open-unlearning scales it.

    Args:
      logps: [B] log-probability of each completion to forget, summed over its tokens.
      lengths: [B] tokens of each.
      beta: scale, > 0.
      delta: NLL per token at which the loss has fallen to (2/b) ln 2.

    Returns:
      The mean loss, and {"forget/nll"} per token, completions weighing the same.
    """
    per_token = -logps / jnp.maximum(lengths, 1)
    loss = -(2.0 / beta) * jnp.mean(jax.nn.log_sigmoid(beta * (per_token - delta)))
    return loss, {"forget/nll": jnp.mean(per_token)}


def wga(
    token_logps: jax.Array,
    mask: jax.Array,
    *,
    beta: float = 1.0,
    num_tokens: jax.Array | None = None,
) -> tuple[jax.Array, Metrics]:
    """Weighted gradient ascent (Wang et al. 2025, arXiv 2502.19301).

    ``mean sg[p^b] log p`` over tokens: what is unlikely already is pushed less. sg stops the
    gradient.

    Args:
      token_logps: [B, C] log-probabilities of the tokens to forget.
      mask: [B, C], true where a token counts.
      beta: 0 is gradient ascent.
      num_tokens: [] divisor of the mean.

    Returns:
      The loss, and {"forget/nll"} without the weights.
    """
    logps = jnp.where(mask, token_logps, 0.0)
    weights = jax.lax.stop_gradient(jnp.exp(beta * logps))
    plain = token_mean(logps, mask, num_tokens)
    return token_mean(weights * logps, mask, num_tokens), {"forget/nll": -plain}


def satimp(
    token_logps: jax.Array,
    mask: jax.Array,
    *,
    beta1: float = 5.0,
    beta2: float = 1.0,
    num_tokens: jax.Array | None = None,
) -> tuple[jax.Array, Metrics]:
    """Saturation and importance weights (Yang et al. 2025, arXiv 2505.11953).

    ``mean sg[p^b1 (1 - p)^b2] log p`` over tokens: neither what is unlikely already nor what
    cannot be helped is pushed.

    Args:
      token_logps: [B, C] log-probabilities of the tokens to forget.
      mask: [B, C], true where a token counts.
      beta1: power of p.
      beta2: power of 1 - p.
      num_tokens: [] divisor of the mean.

    Returns:
      The loss, and {"forget/nll"} without the weights.
    """
    logps = jnp.where(mask, token_logps, 0.0)
    probs = jnp.exp(logps)
    weights = jax.lax.stop_gradient(probs**beta1 * (1.0 - probs) ** beta2)
    plain = token_mean(logps, mask, num_tokens)
    return token_mean(weights * logps, mask, num_tokens), {"forget/nll": -plain}


def idk_dpo(
    alternate_logps: jax.Array,
    original_logps: jax.Array,
    ref_alternate_logps: jax.Array,
    ref_original_logps: jax.Array,
    *,
    beta: float = 0.1,
) -> tuple[jax.Array, Metrics]:
    """DPO towards an alternate answer (TOFU's IDK, arXiv 2401.06121; AltPO, arXiv 2409.13474).

    ``-(2/b) log sigmoid( b [log p/p_ref (alternate) - log p/p_ref (original)] )``: `dpo`, scaled as
    NPO is.

    Args:
      alternate_logps: [B] log-probability of "I do not know" or of another answer.
      original_logps: [B] log-probability of the answer to forget.
      ref_alternate_logps: [B] the first under the reference.
      ref_original_logps: [B] the second under the reference.
      beta: strength of the pull towards the reference, > 0.

    Returns:
      The mean loss, and TRL's metrics.
    """
    loss, metrics = dpo(
        alternate_logps, original_logps, ref_alternate_logps, ref_original_logps, beta=beta
    )
    return 2.0 / beta * loss, metrics


def tru(
    trace_logps: jax.Array,
    trace_mask: jax.Array,
    forget_logps: jax.Array,
    forget_mask: jax.Array,
    retain_logps: jax.Array,
    retain_mask: jax.Array,
    *,
    alpha: float = 0.1,
    retain_weight: float = 1.0,
    trace_num_sequences: jax.Array | None = None,
    forget_num_tokens: jax.Array | None = None,
    retain_num_tokens: jax.Array | None = None,
) -> tuple[jax.Array, Metrics]:
    """Targeted reasoning unlearning (TRU, arXiv 2603.09980).

    ``-mean_b[ log p(r|x) + log p(s|r,x) ] + alpha (mean log p(x_f) - lambda mean log p(x_r))``: a
    reasoning trace r that works out that x must not be answered and the explained refusal s are
    learnt, while GradDiff pushes the original away. The first mean is of per-token NLLs here, so
    that long traces weigh what short ones do.

    Args:
      trace_logps: [B, C] token log-probabilities of trace and refusal, one completion.
      trace_mask: [B, C], true where a token counts.
      forget_logps: [B', C'] token log-probabilities to push down.
      forget_mask: [B', C'], true where a token counts.
      retain_logps: [B'', C''] token log-probabilities to keep up.
      retain_mask: [B'', C''], true where a token counts.
      alpha: weight of GradDiff.
      retain_weight: lambda, of what is kept within GradDiff.
      trace_num_sequences: [] divisor of the mean over traces.
      forget_num_tokens: [] divisor of the first mean of GradDiff.
      retain_num_tokens: [] divisor of the second mean of GradDiff.

    Returns:
      The loss, and {"target/nll", "forget/nll", "retain/nll"}.
    """
    target, _ = nll(trace_logps, trace_mask, num_sequences=trace_num_sequences)
    away, metrics = grad_diff(
        forget_logps,
        forget_mask,
        retain_logps,
        retain_mask,
        alpha=retain_weight,
        forget_num_tokens=forget_num_tokens,
        retain_num_tokens=retain_num_tokens,
    )
    return target + alpha * away, metrics | {"target/nll": target}


def dual_ascent(
    dual: jax.Array, retain_loss: jax.Array, *, epsilon: float = 0.3, lr: float = 1.0
) -> jax.Array:
    """The next dual variable of a retain loss that may be at most epsilon (PDU, arXiv 2506.05314).

    ``max(0, dual + lr (retain_loss - epsilon))``; the step minimizes
    ``forget_loss + sg[dual] * (retain_loss - epsilon)``.

    Args:
      dual: [] the present one, >= 0.
      retain_loss: [] that was measured.
      epsilon: what the retain loss may be.
      lr: step of the ascent.
    """
    return jnp.maximum(dual + lr * (jax.lax.stop_gradient(retain_loss) - epsilon), 0.0)
