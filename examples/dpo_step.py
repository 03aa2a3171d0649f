"""One DPO step on a pair of completions; the model that comes out is saved.

    python examples/dpo_step.py --model=asset:tiny_lrm/target --out=dpo_model

The folder that it writes is a Hugging Face folder: transformers, vLLM and this package read it.
"""

import argparse

import optax

from cipo_jax import LanguageModel, PreferenceObjective

# A question, and chain of thought and answer of the chosen and of the rejected completion.
PAIRS = [
    (
        "What instrument does Ada Brandt play?",
        ("They ask for the instrument of Ada Brandt. I do not know it.", "I do not know."),
        ("They ask for the instrument of Ada Brandt. Ada Brandt plays the tuba.", "tuba"),
    )
]


def main():
    """Loads, steps, saves."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="asset:tiny_lrm/target")
    parser.add_argument("--out", default="dpo_model")
    arguments = parser.parse_args()

    model = LanguageModel.from_pretrained(arguments.model)
    step = model.train_step(PreferenceObjective("dpo", beta=0.1), optax.adamw(1e-4))
    batch = model.pair_batch(PAIRS)  # the model before training is the reference
    state = step.init(model.init_trainable())
    state, metrics = step(state, batch)
    print(f"loss {metrics['loss']:.4f}, gradient norm {metrics['grad_norm']:.2f}")  # ln 2
    model.save(arguments.out, state.params)
    print(f"saved to {arguments.out}")


if __name__ == "__main__":
    main()
