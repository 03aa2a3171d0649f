"""A method of your own, registered and run: unlikelihood training on one person of the tiny world.

    python examples/your_method.py

The page docs/adding_a_method.md explains the parts. On the command line the method of a module
`my_methods` is found with `--config.plugins=my_methods --config.method=unlikelihood`.
"""

import dataclasses
import tempfile

import jax.numpy as jnp

from cipo_jax import Config, parse
from cipo_jax.config import tiny_config
from cipo_jax.experiments.unlearn import open_run, unlearn
from cipo_jax.methods.base import register
from cipo_jax.methods.fixed_target import FixedTarget
from cipo_jax.methods.objective import ForgetLoss
from cipo_jax.progress import Reporter


@dataclasses.dataclass(frozen=True)
class Unlikelihood(ForgetLoss):
    """Mean of -log(1 - p) over the tokens to forget (Welleck et al. 2020, arXiv 1908.04319)."""

    def __call__(self, policy, params, batch, context):
        forget = batch["forget"]
        logps = policy.completion_logps(params, forget)  # [B, C]; padding may hold anything
        logps = jnp.where(forget.mask, jnp.minimum(logps, -1e-6), -1.0)
        losses = jnp.where(forget.mask, -jnp.log(-jnp.expm1(logps)), 0.0)
        count = forget.mask.sum() if forget.num_tokens is None else forget.num_tokens
        loss = losses.sum() / count
        return loss, {"forget/unlikelihood": loss}


ABOUT = "unlikelihood training"
register(FixedTarget("unlikelihood", ABOUT, loss=lambda config: Unlikelihood(), forget_weight=0.02))


def main():
    """One round of twelve epochs on 42 questions, evaluated before and after."""
    config = tiny_config()
    config.method = "unlikelihood"
    config.forget.people = ("Ada Brandt",)
    config.fixed_target.rounds = 1
    config.train.epochs, config.train.lr = 12.0, 1e-3
    config.data.valid_rows = config.data.eval_rows = 8
    with tempfile.TemporaryDirectory() as workdir:
        method, run = open_run(parse(Config, config), workdir, Reporter())
        result = unlearn(method, run)
    print("before:", result.before)
    print("after: ", result.after)


if __name__ == "__main__":
    main()
