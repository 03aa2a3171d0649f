"""AdamW with warm-up, decay and clipping, from optax."""

import optax

from cipo_jax.config import TrainConfig


def make_schedule(config: TrainConfig, steps: int) -> optax.Schedule:
    """Learning rate of each of a phase's steps: linear warm-up, then the chosen decay to zero."""
    warmup = min(config.warmup_steps, max(steps - 1, 0))
    rest = max(steps - warmup, 1)
    decay = {
        "constant": optax.constant_schedule(config.lr),
        "linear": optax.linear_schedule(config.lr, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(config.lr, rest),
    }[config.decay]
    if not warmup:
        return decay
    # The first step already moves: warm-up starts at lr / (warmup + 1), not at zero.
    rise = optax.linear_schedule(config.lr / (warmup + 1), config.lr, warmup)
    return optax.join_schedules([rise, decay], [warmup])


def make_optimizer(config: TrainConfig, steps: int) -> optax.GradientTransformation:
    """The optimizer of one phase. Weight decay leaves vectors (norm scales, biases) alone."""

    def decayed(params):
        import jax

        # By name: stacked layers add an axis, so the number of dimensions tells nothing.
        def is_matrix(path, x):
            del x
            return path[-1].key not in ("scale", "bias")

        return jax.tree_util.tree_map_with_path(is_matrix, params)

    adamw = optax.adamw(
        make_schedule(config, steps),
        b1=config.b1,
        b2=config.b2,
        weight_decay=config.weight_decay,
        mask=decayed,
    )
    if not config.clip:
        return adamw
    return optax.chain(optax.clip_by_global_norm(config.clip), adamw)
