"""Samples chains of thought: four completions of each question, printed as they end.

    python examples/rollouts.py --model=asset:tiny_lrm/target

Token t of (item, sample) has random numbers of its own, so that the completions do not depend on
the batch size or on the order.
"""

import argparse

import jax

from cipo_jax import LanguageModel, SamplingJob

QUESTIONS = ("What instrument does Ada Brandt play?", "What is 17 + 25?")


def main():
    """Samples and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="asset:tiny_lrm/target")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    arguments = parser.parse_args()

    model = LanguageModel.from_pretrained(arguments.model)
    sampling_params = model.sampling_params(arguments.max_new_tokens, temperature=0.8, top_p=0.95)
    sampler = model.sampler(sampling_params)  # as many rows as fit into memory
    params = sampler.prepare(model.load_params())

    requests = [model.request(question, item) for item, question in enumerate(QUESTIONS)]
    job = SamplingJob(requests, key=jax.random.key(0), num_samples=arguments.samples)
    for completion in sampler.stream(params, job):
        thought = model.chat.split(completion.ids)
        print(f"{QUESTIONS[completion.item]} (sample {completion.sample})")
        print(f"  thought: {thought.cot}")
        print(f"  answer:  {thought.answer}  (log-probability {sum(completion.logps):.2f})")


if __name__ == "__main__":
    main()
