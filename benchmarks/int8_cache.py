"""What int8 keys and values change: the same greedy completions with both caches.

    python benchmarks/int8_cache.py [--model DIR] [--tokens 128] [QUESTION ...]

Prints how many completions are equal, how many tokens two of them share before they part, and how
far apart the log-probabilities of shared tokens are.
"""

import argparse
import dataclasses

import jax
import numpy as np
from cipo_jax.models.reasoning_model import ReasoningModel

from cipo_jax.config import ThinkConfig
from cipo_jax.models.decoder import Compute
from cipo_jax.sampling import Request, Sampler, SamplingJob, SamplingParams
from cipo_jax.training.mesh import make_mesh

TOPICS = (
    "the moon", "bread", "a steam engine", "the alphabet", "volcanoes", "chess", "rivers", "glass",
    "honey bees", "the number seven", "paper", "winter", "bridges", "salt", "music", "maps",
)  # fmt: skip
FORMS = ("Explain in a few sentences how {} came to be.", "Write a short story about {}.")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="asset:tiny_lrm/target")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("questions", nargs="*")
    arguments = parser.parse_args()
    questions = arguments.questions or [f.format(t) for t in TOPICS for f in FORMS]
    think = ThinkConfig()
    if not arguments.model.startswith("asset:"):
        turn = "<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        think = ThinkConfig(prompt=turn)
    model = ReasoningModel.open(arguments.model, think)
    full = Sampler(model.config, Compute(), make_mesh(1, 1, 1, jax.devices()[:1]), 32)
    params = full.prepare(model.load_params())
    requests = [Request(model.format.prompt_ids(q), i) for i, q in enumerate(questions)]
    sampling_params = SamplingParams(
        arguments.tokens, model.format.stop_ids, vocabulary=model.format.vocabulary
    )
    job = SamplingJob(requests, sampling_params)
    pairs = []
    for sampler in (full, dataclasses.replace(full, int8_cache=True)):
        pairs.append([c for (c,) in sampler.sample(params, job)])
    equal, shared, apart = 0, [], []
    for a, b in zip(*pairs, strict=True):
        ends = [i for i, (x, y) in enumerate(zip(a.ids, b.ids, strict=False)) if x != y]
        end = ends[0] if ends else min(len(a.ids), len(b.ids))
        equal += a.ids == b.ids
        shared.append(end / len(a.ids))
        apart += np.abs(np.subtract(a.logps[:end], b.logps[:end])).tolist()
    print(
        f"{equal} of {len(requests)} completions equal; {np.mean(shared):.0%} of the tokens come "
        f"before they part; log-probabilities there differ by {np.mean(apart):.4f} nats in the "
        f"mean, {np.max(apart):.3f} at most"
    )


if __name__ == "__main__":
    main()
