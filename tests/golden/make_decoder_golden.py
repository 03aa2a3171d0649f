"""Writes decoder.npz: small random models of each architecture, and the logits torch gives them.

    python tests/golden/make_decoder_golden.py

Needs torch and transformers. Of each case the file holds its config.json, every tensor under its
Hugging Face name, token ids and logits in float32.
"""

import json
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).parent / "decoder.npz"
VOCABULARY = 280  # As many as the smallest byte-level tokenizer needs, about.
# Heads are wider than hidden_size / heads in all but Qwen2, whose configuration knows no head_dim.
_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
CASES = {
    "llama": ("Llama", {"head_dim": 10, "rms_norm_eps": 1e-5, "rope_theta": 500.0}),
    "llama_tied": ("Llama", {"head_dim": 10, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2", {"rope_theta": 1000000.0}),
    "qwen3": ("Qwen3", {"head_dim": 10, "rms_norm_eps": 1e-4, "tie_word_embeddings": True}),
}


def build(case, seed=0):
    """The torch model of a case; no weight, bias or scale is at its trivial value."""
    import torch
    import transformers

    family, fields = CASES[case]
    fields = _SHAPE | fields
    theta = fields.pop("rope_theta", 10000.0)
    fields["rope_parameters"] = {"rope_type": "default", "rope_theta": theta}
    config = getattr(transformers, f"{family}Config")(**fields)
    model = getattr(transformers, f"{family}ForCausalLM")(config).float().eval()
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = rng.normal(scale=0.3, size=tuple(parameter.shape))
            parameter.copy_(torch.from_numpy(noise + name.endswith("norm.weight")))
    return model


def random_tokens(seed=0):
    return np.random.default_rng(seed).integers(0, VOCABULARY, size=(2, 17)).astype(np.int32)


def torch_logits(model, tokens):
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(tokens).long()).logits.numpy()


def main():
    arrays = {}
    for case in CASES:
        model, tokens = build(case), random_tokens()
        fields = model.config.to_dict() | {"architectures": [type(model).__name__]}
        arrays[f"{case}/config.json"] = np.array(json.dumps(fields))
        arrays[f"{case}/tokens"] = tokens
        arrays[f"{case}/logits"] = torch_logits(model, tokens)
        for name, parameter in model.named_parameters():
            arrays[f"{case}/tensors/{name}"] = parameter.detach().numpy()
    np.savez_compressed(GOLDEN, **arrays)
    print(f"{GOLDEN}: {GOLDEN.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
