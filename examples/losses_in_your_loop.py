"""The losses alone, in a plain JAX and optax loop: NPO makes a next-token table forget two texts.

    python examples/losses_in_your_loop.py

`cipo_jax.losses` imports jax and nothing else: models, data and optimizers are yours.
"""

import jax
import jax.numpy as jnp
import optax

from cipo_jax import losses

TEXTS = jnp.array([[3, 1, 4, 1, 5, 9], [2, 7, 1, 8, 2, 0]])  # token ids
MASK = jnp.array([[0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 0]], bool)  # tokens to forget


def sequence_logps(params, texts, mask):
    """[B] log-probability of the masked tokens, each given the token before it."""
    logps = jax.nn.log_softmax(params["table"][texts[:, :-1]])
    token_logps = jnp.take_along_axis(logps, texts[:, 1:, None], axis=-1)[..., 0]
    return losses.sequence_logps(token_logps, mask[:, 1:])


def loss_fn(params, ref_logps):
    """NPO on the texts to forget; `ref_logps` are those of the model before."""
    return losses.npo(sequence_logps(params, TEXTS, MASK), ref_logps, beta=0.1)


def main():
    """Ten steps."""
    params = {"table": jax.random.normal(jax.random.key(0), (10, 10))}
    ref_logps = sequence_logps(params, TEXTS, MASK)
    optimizer = optax.adam(0.1)
    state = optimizer.init(params)

    @jax.jit
    def step(params, state):
        (loss, _), gradient = jax.value_and_grad(loss_fn, has_aux=True)(params, ref_logps)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state, loss

    for number in range(1, 11):
        params, state, loss = step(params, state)
        print(f"step {number}: loss {loss:.3f}")  # the first is 2 ln 2 / beta = 13.863
    print("log-probabilities before", ref_logps, "after", sequence_logps(params, TEXTS, MASK))


if __name__ == "__main__":
    main()
