"""Writes decoder.npz: small random models of each architecture, and what torch makes of them.

    python tests/golden/make_decoder_golden.py

Needs torch and transformers. Of each case the file holds its config.json, every tensor under its
Hugging Face name, a text with float32 logits at some of its positions, the divergence of torch's
own bfloat16 logits there, and three prompts with 64 greedily generated tokens each.
"""

import copy
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

GOLDEN = Path(__file__).parent / "decoder.npz"
VOCABULARY = 280  # As many as the smallest byte-level tokenizer needs, about.
TEXT = 64
LOGITS_AT = slice(3, None, 6)  # Positions of the text whose logits are kept.
PROMPTS = (3, 17, 40)  # Short of the original context of each scaled rope, and past it.
NEW = 64
MARGIN = 1e-3  # Between the two best logits of each greedy choice, far above rounding.
VARIED = 16  # Different tokens in each generation, at least.
# Heads of 10 are wider than hidden_size / heads, and have an odd number of pairs.
_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}


class Case(NamedTuple):
    """A model: its transformers class, what its config.json says beyond _SHAPE, and two seeds.

    The seeds (of the golden and of the live test) are ones for which the greedy choices are clear
    and varied; `main` checks the first, the live test the second.
    """

    family: str
    fields: dict[str, Any]
    seeds: tuple[int, int] = (0, 1)


# Contexts are so short that texts and generations reach far past them; bases are so small that
# every branch of the scaled ropes has frequencies of its own.
_SHORT = {"max_position_embeddings": 32}
_LINEAR = {"type": "linear", "factor": 3.0}
_DYNAMIC = {"type": "dynamic", "factor": 2.0}
_LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
_MSCALE = {
    "beta_fast": 2.5, "beta_slow": 0.4, "truncate": False, "mscale": 1.4, "mscale_all_dim": 0.6,
}  # fmt: skip
_WIDE = {"head_dim": 10, "rope_theta": 500.0}
CASES = {
    "llama": Case("Llama", _WIDE | {"rms_norm_eps": 1e-5}),
    "llama_tied": Case("Llama", {"num_key_value_heads": 4, "tie_word_embeddings": True}, (1, 2)),
    "llama_biases": Case(
        "Llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1}, (1, 6)
    ),
    "llama_linear": Case("Llama", _WIDE | _SHORT | {"rope_scaling": _LINEAR}),
    "llama_dynamic": Case("Llama", _WIDE | _SHORT | {"rope_scaling": _DYNAMIC}, (0, 2)),
    "llama_llama3": Case("Llama", _WIDE | {"rope_scaling": _LLAMA3}),
    "llama_yarn": Case("Llama", _WIDE | {"rope_scaling": _YARN | {"beta_fast": 4.0}}),
    "llama_yarn_mscale": Case("Llama", _WIDE | {"rope_scaling": _YARN | _MSCALE}, (0, 4)),
    "qwen2": Case("Qwen2", {"rope_theta": 1000000.0}),
    "qwen2_window": Case(
        "Qwen2",
        {
            "num_hidden_layers": 3,
            "use_sliding_window": True,
            "sliding_window": 9,
            "max_window_layers": 1,
        },
        (4, 6),
    ),
    "qwen3": Case("Qwen3", _WIDE | {"rms_norm_eps": 1e-4, "tie_word_embeddings": True}, (0, 9)),
    # As DeepSeek-R1-0528-Qwen3-8B has it; transformers goes on without attn_factor.
    "qwen3_yarn": Case(
        "Qwen3",
        _WIDE | {"attention_bias": True, "rope_scaling": _YARN | {"attn_factor": 0.878}},
        (1, 5),
    ),
    "mistral_window": Case("Mistral", {"head_dim": 10, "sliding_window": 7}),
    "smollm3": Case(
        "SmolLM3",
        {
            "num_hidden_layers": 3,
            "no_rope_layers": [1, 0, 1],
            "tie_word_embeddings": True,
            "attention_bias": True,
            "mlp_bias": True,
        },
        (3, 7),
    ),
    # Layers without rope have windows, the others are dynamic.
    "smollm3_dynamic": Case(
        "SmolLM3",
        {
            "num_hidden_layers": 4,
            "no_rope_layer_interval": 2,
            "use_sliding_window": True,
            "sliding_window": 11,
            "rope_scaling": _DYNAMIC,
            "max_position_embeddings": 32,
        },
        (1, 5),
    ),
    "olmo2": Case("Olmo2", {}, (2, 7)),
    # Three layers have a window and a plain rope, the fourth has yarn.
    "olmo3": Case(
        "Olmo3",
        {
            "num_hidden_layers": 4,
            "attention_bias": True,
            "sliding_window": 8,
            "rope_theta": 500000.0,
            "rope_scaling": _YARN | {"attention_factor": 1.2},
        },
        (1, 4),
    ),
}


def fields_of(case):
    """The config.json of a case, in the spelling of published ones."""
    family, fields, _ = CASES[case]
    names = {"architectures": [f"{family}ForCausalLM"], "model_type": family.lower()}
    return names | _SHAPE | fields


def build(case, seed=0):
    """The torch model of a case; no weight, bias or scale is at its trivial value.

    Values are multiples of 1/64 below 4, which float16 and bfloat16 both hold exactly.
    """
    import torch
    import transformers

    family = CASES[case].family
    config = getattr(transformers, f"{family}Config").from_dict(copy.deepcopy(fields_of(case)))
    model = getattr(transformers, f"{family}ForCausalLM")(config).float().eval()
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = rng.normal(scale=0.3, size=tuple(parameter.shape))
            value = np.round(64 * (noise + name.endswith("norm.weight"))) / 64
            parameter.copy_(torch.from_numpy(value))
    return model


def random_tokens(seed=0, shape=(2, TEXT)):
    return np.random.default_rng(seed).integers(0, VOCABULARY, size=shape).astype(np.int32)


def random_prompts(seed=0):
    """Right-padded prompts and their lengths."""
    return random_tokens((seed, 1), (len(PROMPTS), max(PROMPTS))), np.array(PROMPTS, np.int32)


def torch_logits(model, tokens):
    """Float32 logits. Of a copy: a dynamic rope remembers the longest text it has seen."""
    import torch

    with torch.no_grad():
        return copy.deepcopy(model)(torch.from_numpy(tokens).long()).logits.float().numpy()


def torch_greedy(model, prompts, lengths):
    """Greedily generated ids [P, NEW] and the smallest margin of a choice, prompt by prompt."""
    import torch

    whole, margins = [], []
    for prompt, length in zip(prompts, lengths, strict=True):
        ids = torch.from_numpy(prompt[None, :length]).long()
        fresh = copy.deepcopy(model)  # As above.
        fresh.generation_config.eos_token_id = None
        out = fresh.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        whole.append(out.sequences[0, length:].numpy())
        best = torch.cat(out.logits).topk(2, dim=-1).values
        margins.append(float((best[:, 0] - best[:, 1]).min()))
    return np.stack(whole).astype(np.int32), min(margins)


def divergence(wanted, found):
    """Mean over positions of KL(softmax wanted || softmax found), in nats."""

    def logps(x):
        x = x.astype(np.float64)
        x = x - x.max(-1, keepdims=True)
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    p, q = logps(wanted), logps(found)
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def varied(ids):
    return min(len(np.unique(row)) for row in ids)


def narrow(model):
    """A bfloat16 copy; its rope's frequencies stay float32, as they do in from_pretrained."""
    import torch

    model = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    return model


def main():
    arrays = {}
    for name, case in CASES.items():
        seed = case.seeds[0]
        model, tokens, (prompts, lengths) = (
            build(name, seed),
            random_tokens(seed),
            random_prompts(seed),
        )
        logits = torch_logits(model, tokens)[:, LOGITS_AT]
        narrow_logits = torch_logits(narrow(model), tokens)[:, LOGITS_AT]
        greedy, margin = torch_greedy(model, prompts, lengths)
        if margin < MARGIN or varied(greedy) < VARIED:
            raise SystemExit(
                f"{name}, seed {seed}: smallest margin {margin:.1e}, {varied(greedy)} different "
                "tokens; choose another seed"
            )
        arrays |= {
            f"{name}/config.json": np.array(json.dumps(fields_of(name))),
            f"{name}/tokens": tokens.astype(np.int16),
            f"{name}/logits": logits,
            f"{name}/bfloat16_divergence": np.array(divergence(logits, narrow_logits)),
            f"{name}/prompts": prompts.astype(np.int16),
            f"{name}/lengths": lengths,
            f"{name}/greedy": greedy.astype(np.int16),
        }
        for key, parameter in model.named_parameters():
            value = parameter.detach().numpy()
            assert (np.abs(value) < 4).all(), key
            arrays[f"{name}/tensors/{key}"] = value.astype(np.float16)
        print(f"{name}: margin {margin:.1e}, {varied(greedy)} different tokens")
    np.savez_compressed(GOLDEN, **arrays)
    print(f"{GOLDEN}: {GOLDEN.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
