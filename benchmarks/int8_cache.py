"""What int8 keys and values change: the same greedy completions with both caches.

    python benchmarks/int8_cache.py [--model DIR] [--tokens 128] [QUESTION ...]

Prints how many completions are equal, the share of tokens before the first difference, and the
differences between the log-probabilities of those tokens.
"""

import argparse
import dataclasses

import jax
import numpy as np

from cipo_jax import LanguageModel, SamplingJob, SamplingParams, make_mesh
from cipo_jax.config import ThinkConfig

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
    mesh = make_mesh(1, 1, 1, jax.devices()[:1])
    model = LanguageModel.from_pretrained(arguments.model, mesh, think=think)
    full = model.sampler(max_batch_size=32)
    params = full.prepare(model.load_params())
    requests = [model.request(question, item) for item, question in enumerate(questions)]
    sampling_params = SamplingParams.for_chat(model.chat, arguments.tokens)
    job = SamplingJob(requests, sampling_params)
    pairs = []
    for sampler in (full, dataclasses.replace(full, int8_cache=True)):
        pairs.append([c for (c,) in sampler.sample(params, job)])
    equal, shared, differences = 0, [], []
    for a, b in zip(*pairs, strict=True):
        ends = [i for i, (x, y) in enumerate(zip(a.ids, b.ids, strict=False)) if x != y]
        end = ends[0] if ends else min(len(a.ids), len(b.ids))
        equal += a.ids == b.ids
        shared.append(end / len(a.ids))
        differences += np.abs(np.subtract(a.logps[:end], b.logps[:end])).tolist()
    print(
        f"{equal} of {len(requests)} completions equal; {np.mean(shared):.0%} of the tokens come "
        f"before the first difference; log-probabilities there differ by "
        f"{np.mean(differences):.4f} nats in the mean, {np.max(differences):.3f} at most"
    )


if __name__ == "__main__":
    main()
