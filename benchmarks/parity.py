"""Our logits and generations against those of transformers, per architecture, as one table.

    python benchmarks/parity.py [--write]

Needs torch. The models are those of tests/golden/make_decoder_golden.py: small and random, one per
architecture and rope scaling, with texts and generations far beyond the original context. Each has
two sets of weights. With --write the table replaces the one in docs/models.md.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import jax
import jax.numpy as jnp
import numpy as np
from engines import Document
from golden import make_decoder_golden as golden
from one_batch import generate

from cipo_jax.models.decoder import Compute, decoding_layout, head_matrix, hidden_states
from cipo_jax.models.pretrained import PretrainedFolder
from cipo_jax.sampling import SamplingParams

DOCUMENT = Document("models.md", "parity")


@jax.jit(static_argnums=(0, 1))
def logits_of(config, compute, params, tokens):
    hidden = hidden_states(config, compute, params, tokens)
    return jnp.dot(
        hidden, head_matrix(config, params).astype(hidden.dtype), preferred_element_type=jnp.float32
    )


@jax.jit(static_argnums=0)
def greedy(config, params, prompts, lengths):
    layout = decoding_layout(config, params, "float32")
    keys = jax.random.split(jax.random.key(0), (len(lengths), 1))
    sampling_params = SamplingParams(golden.NEW, stop_ids=())
    return generate(config, Compute(), sampling_params, layout, prompts, lengths, keys).ids[:, 0]


def compare(name, seed):
    """(max |dlogit|, KL bfloat16 ours, KL bfloat16 torch, tokens equal in the worst generation)."""
    model, tokens = golden.build(name, seed), golden.random_tokens(seed)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        pretrained = PretrainedFolder.open(folder)
        config, params = pretrained.config, pretrained.load_params()
    wanted = golden.torch_logits(model, tokens)
    found = np.asarray(logits_of(config, Compute(), params, tokens))
    narrow = np.asarray(logits_of(config, Compute(dtype="bfloat16"), params, tokens))
    prompts, lengths = golden.random_prompts(seed)
    ids, _ = golden.torch_greedy(model, prompts, lengths)
    equal = np.asarray(greedy(config, params, prompts, lengths)) == ids
    return (
        np.max(np.abs(found - wanted)),
        golden.divergence(wanted, narrow),
        golden.divergence(wanted, golden.torch_logits(golden.narrow(model), tokens)),
        # A token counts while all before it are equal.
        np.cumprod(equal, axis=1).sum(axis=1).min(),
    )


def lines():
    yield "| case | architecture | max \\|Δlogit\\| f32 | KL bf16 | torch's own | tokens equal |\n"
    yield "|---|---|--:|--:|--:|--:|\n"
    for name, case in golden.CASES.items():
        dlogit, ours, theirs, equal = zip(*(compare(name, s) for s in case.seeds), strict=True)
        yield (
            f"| {name} | {case.family}ForCausalLM | {max(dlogit):.1e} | {np.mean(ours):.1e} "
            f"| {np.mean(theirs):.1e} | {min(equal)} of {golden.NEW} |\n"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put the table into docs/models.md")
    arguments = parser.parse_args()
    if arguments.write:
        DOCUMENT.check(parser)
    try:
        import torch
        from transformers.utils import logging
    except ImportError as error:
        raise SystemExit(f"parity: {error}; this compares with torch") from None
    torch.set_num_threads(1)  # Threads would wait for each other longer than these models compute.
    logging.set_verbosity_error()
    table = []
    for line in lines():
        print(line, end="", flush=True)
        table.append(line)
    if arguments.write:
        DOCUMENT.put("".join(table))


if __name__ == "__main__":
    main()
