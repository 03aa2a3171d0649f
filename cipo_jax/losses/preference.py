"""Preference losses on the log-probabilities of whole completions.

x is a prompt, y_w the chosen and y_l the rejected completion; logps are sums over a completion's
tokens, in nats, all of shape [B].
"""

import jax
import jax.numpy as jnp

from cipo_jax.losses._shared import Metrics


def _metrics(
    chosen_rewards: jax.Array,
    rejected_rewards: jax.Array,
    chosen_logps: jax.Array,
    rejected_logps: jax.Array,
) -> Metrics:
    margins = chosen_rewards - rejected_rewards
    return {
        "rewards/chosen": jnp.mean(chosen_rewards),
        "rewards/rejected": jnp.mean(rejected_rewards),
        "rewards/accuracies": jnp.mean((margins > 0).astype(jnp.float32)),
        "rewards/margins": jnp.mean(margins),
        "logps/chosen": jnp.mean(chosen_logps),
        "logps/rejected": jnp.mean(rejected_logps),
    }


def _mean(losses: jax.Array, weights: jax.Array | None) -> jax.Array:
    """Mean over B of the weighted losses: a pair of weight 0 counts as one that has no loss."""
    return jnp.mean(losses if weights is None else weights * losses)


def _against_reference(
    chosen_logps: jax.Array,
    rejected_logps: jax.Array,
    ref_chosen_logps: jax.Array,
    ref_rejected_logps: jax.Array,
    beta: float,
) -> tuple[jax.Array, Metrics]:
    """DPO's margins ``b d`` [B], and the metrics. The reference gets no gradient."""
    chosen_rewards = beta * (chosen_logps - jax.lax.stop_gradient(ref_chosen_logps))
    rejected_rewards = beta * (rejected_logps - jax.lax.stop_gradient(ref_rejected_logps))
    metrics = _metrics(chosen_rewards, rejected_rewards, chosen_logps, rejected_logps)
    return chosen_rewards - rejected_rewards, metrics


def _sigmoid_losses(margins: jax.Array, label_smoothing: float) -> jax.Array:
    """``-(1-e) log sigmoid(m) - e log sigmoid(-m)`` of margins m [B]."""
    losses = -(1.0 - label_smoothing) * jax.nn.log_sigmoid(margins)
    return losses - label_smoothing * jax.nn.log_sigmoid(-margins)


def dpo(
    chosen_logps: jax.Array,
    rejected_logps: jax.Array,
    ref_chosen_logps: jax.Array,
    ref_rejected_logps: jax.Array,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    weights: jax.Array | None = None,
) -> tuple[jax.Array, Metrics]:
    """Direct preference optimization (Rafailov et al. 2023, arXiv 2305.18290, eq. 7).

    ``-(1-e) log sigmoid(b d) - e log sigmoid(-b d)`` with
    ``d = [log p(y_w) - log p_ref(y_w)] - [log p(y_l) - log p_ref(y_l)]``; e > 0 is the conservative
    variant for noisy labels (Mitchell 2023). Where policy and reference agree the loss is ln 2.

    Args:
      chosen_logps: [B] log-probability of y_w under the policy.
      rejected_logps: [B] log-probability of y_l under the policy.
      ref_chosen_logps: [B] log-probability of y_w under the reference.
      ref_rejected_logps: [B] log-probability of y_l under the reference.
      beta: strength of the pull towards the reference, > 0.
      label_smoothing: e, the share of pairs taken to be the wrong way round, in [0, 0.5).
      weights: [B] factors of the pairs' losses in their mean over B; None for ones.

    Returns:
      The mean loss, and TRL's metrics; rewards are ``beta * (log p - log p_ref)``.
    """
    margins, metrics = _against_reference(
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta
    )
    return _mean(_sigmoid_losses(margins, label_smoothing), weights), metrics


def ipo(
    chosen_logps: jax.Array,
    rejected_logps: jax.Array,
    ref_chosen_logps: jax.Array,
    ref_rejected_logps: jax.Array,
    chosen_lengths: jax.Array,
    rejected_lengths: jax.Array,
    *,
    beta: float = 0.1,
    weights: jax.Array | None = None,
) -> tuple[jax.Array, Metrics]:
    """Identity preference optimization (Azar et al. 2023, arXiv 2310.12036, eq. 17).

    ``(d - 1/(2 b))^2`` with d as in DPO but on log-ratios averaged over each completion's tokens,
    as the authors advise and TRL does.

    Args:
      chosen_logps: [B] log-probability of y_w under the policy.
      rejected_logps: [B] log-probability of y_l under the policy.
      ref_chosen_logps: [B] log-probability of y_w under the reference.
      ref_rejected_logps: [B] log-probability of y_l under the reference.
      chosen_lengths: [B] tokens of y_w.
      rejected_lengths: [B] tokens of y_l.
      beta: tau in the paper, > 0.
      weights: [B] factors of the pairs' losses in their mean over B; None for ones.

    Returns:
      The mean loss, and TRL's metrics.
    """
    chosen = (chosen_logps - jax.lax.stop_gradient(ref_chosen_logps)) / jnp.maximum(
        chosen_lengths, 1
    )
    rejected = (rejected_logps - jax.lax.stop_gradient(ref_rejected_logps)) / jnp.maximum(
        rejected_lengths, 1
    )
    losses = jnp.square(chosen - rejected - 1.0 / (2.0 * beta))
    return _mean(losses, weights), _metrics(
        beta * chosen, beta * rejected, chosen_logps, rejected_logps
    )


def simpo(
    chosen_logps: jax.Array,
    rejected_logps: jax.Array,
    chosen_lengths: jax.Array,
    rejected_lengths: jax.Array,
    *,
    beta: float = 2.0,
    gamma: float = 0.5,
    label_smoothing: float = 0.0,
    weights: jax.Array | None = None,
) -> tuple[jax.Array, Metrics]:
    """Simple preference optimization (Meng et al. 2024, arXiv 2405.14734, eq. 6). No reference.

    ``-log sigmoid( b/|y_w| log p(y_w) - b/|y_l| log p(y_l) - gamma )``.

    Args:
      chosen_logps: [B] log-probability of y_w under the policy.
      rejected_logps: [B] log-probability of y_l under the policy.
      chosen_lengths: [B] tokens of y_w.
      rejected_lengths: [B] tokens of y_l.
      beta: scale of the rewards, > 0.
      gamma: target margin between the two rewards, in the units of the rewards.
      label_smoothing: as in `dpo`.
      weights: [B] factors of the pairs' losses in their mean over B; None for ones.

    Returns:
      The mean loss, and TRL's metrics; rewards are ``beta * log p / |y|``.
    """
    chosen_rewards = beta * chosen_logps / jnp.maximum(chosen_lengths, 1)
    rejected_rewards = beta * rejected_logps / jnp.maximum(rejected_lengths, 1)
    losses = _sigmoid_losses(chosen_rewards - rejected_rewards - gamma, label_smoothing)
    return _mean(losses, weights), _metrics(
        chosen_rewards, rejected_rewards, chosen_logps, rejected_logps
    )


def hinge(
    chosen_logps: jax.Array,
    rejected_logps: jax.Array,
    ref_chosen_logps: jax.Array,
    ref_rejected_logps: jax.Array,
    *,
    beta: float = 0.1,
    weights: jax.Array | None = None,
) -> tuple[jax.Array, Metrics]:
    """Hinge loss on DPO's margin (SLiC, Zhao et al. 2023, arXiv 2305.10425; RSO, arXiv 2309.06657).

    ``max(0, 1 - b d)`` with d as in DPO; here b is the inverse of the margin in nats. Arguments,
    [B] each, and what is returned are those of `dpo`.
    """
    margins, metrics = _against_reference(
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta
    )
    return _mean(jax.nn.relu(1.0 - margins), weights), metrics


def robust_dpo(
    chosen_logps: jax.Array,
    rejected_logps: jax.Array,
    ref_chosen_logps: jax.Array,
    ref_rejected_logps: jax.Array,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.1,
    weights: jax.Array | None = None,
) -> tuple[jax.Array, Metrics]:
    """DPO made unbiased under flipped labels (Chowdhury et al. 2024, arXiv 2403.00409, eq. 12).

    ``[-(1-e) log sigmoid(b d) + e log sigmoid(-b d)] / (1 - 2e)`` with d as in DPO: in expectation
    over labels that are flipped with probability e it is DPO's loss of the true ones. It may be
    negative. Arguments, [B] each, and what is returned are those of `dpo`.
    """
    margins, metrics = _against_reference(
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta
    )
    losses = -(1.0 - label_smoothing) * jax.nn.log_sigmoid(margins)
    losses = losses + label_smoothing * jax.nn.log_sigmoid(-margins)
    return _mean(losses / (1.0 - 2.0 * label_smoothing), weights), metrics


def cpo(
    chosen_logps: jax.Array,
    rejected_logps: jax.Array,
    chosen_lengths: jax.Array,
    *,
    beta: float = 0.1,
    alpha: float = 1.0,
    label_smoothing: float = 0.0,
    weights: jax.Array | None = None,
) -> tuple[jax.Array, Metrics]:
    """Contrastive preference optimization (Xu et al. 2024, arXiv 2401.08417, eq. 5). No reference.

    ``-log sigmoid(b [log p(y_w) - log p(y_l)]) - a log p(y_w) / |y_w|``.

    Args:
      chosen_logps: [B] log-probability of y_w under the policy.
      rejected_logps: [B] log-probability of y_l under the policy.
      chosen_lengths: [B] tokens of y_w.
      beta: scale of the rewards, > 0.
      alpha: weight of the NLL on the chosen completions, in nats per token.
      label_smoothing: as in `dpo`.
      weights: [B] factors of the pairs' losses in their mean over B; None for ones.

    Returns:
      The mean loss, and TRL's metrics; rewards are ``beta * log p``.
    """
    losses = _sigmoid_losses(beta * (chosen_logps - rejected_logps), label_smoothing)
    losses = losses - alpha * chosen_logps / jnp.maximum(chosen_lengths, 1)
    return _mean(losses, weights), _metrics(
        beta * chosen_logps, beta * rejected_logps, chosen_logps, rejected_logps
    )


def orpo(
    chosen_logps: jax.Array,
    rejected_logps: jax.Array,
    chosen_lengths: jax.Array,
    rejected_lengths: jax.Array,
    *,
    beta: float = 0.1,
    weights: jax.Array | None = None,
) -> tuple[jax.Array, Metrics]:
    """Odds ratio preference optimization (Hong et al. 2024, arXiv 2403.07691, eq. 6 and 7).

    ``-l_w - b log sigmoid( log odds(l_w) - log odds(l_l) )`` with l = log p / |y| and
    ``log odds(l) = l - log(1 - exp l)``. No reference.

    Args:
      chosen_logps: [B] log-probability of y_w under the policy, < 0.
      rejected_logps: [B] log-probability of y_l under the policy, < 0.
      chosen_lengths: [B] tokens of y_w.
      rejected_lengths: [B] tokens of y_l.
      beta: lambda in the paper, the weight of the odds ratio, >= 0.
      weights: [B] factors of the pairs' losses in their mean over B; None for ones.

    Returns:
      The mean loss, and TRL's metrics; rewards are ``beta * log p / |y|``.
    """
    chosen = chosen_logps / jnp.maximum(chosen_lengths, 1)
    rejected = rejected_logps / jnp.maximum(rejected_lengths, 1)

    def log_odds(logps: jax.Array) -> jax.Array:
        # A mean of exactly 0 has no odds; the smallest step below it has.
        logps = jnp.minimum(logps, -jnp.finfo(logps.dtype).tiny)
        return logps - jnp.log(-jnp.expm1(logps))

    losses = -chosen - beta * jax.nn.log_sigmoid(log_odds(chosen) - log_odds(rejected))
    return _mean(losses, weights), _metrics(
        beta * chosen, beta * rejected, chosen_logps, rejected_logps
    )
