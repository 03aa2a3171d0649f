"""The engines that sampling.py compares; each runs in a process of its own, alone or waiting.

    python benchmarks/sampling_peers.py ENGINE FOLDER THREADS ROWS

Reads workloads from stdin, one JSON object a line, and answers each with a line of JSON; "matmul"
stands for measuring the library's limit. Nothing of this package is imported but by its own engine,
since others have other environments. Every engine works in float32.

- ours: `LanguageModel.sampler`, ROWS rows at a time at most.
- transformers: `generate` with torch, all rows in one batch, padded on the left, with its usual
  cache. A row ends by a stopping criterion; `generate` goes on computing it, unused, until the last
  one ends.
- tunix: `tunix.generate.sampler.Sampler` with its Llama and its loader, all rows in one batch; a
  sampler for each size of the cache, so that the cache is as small as the workload allows. It ends
  rows at stop ids alone, never at lengths, so all rows run to the greatest length and are cut: the
  device does what it would do for rows that had stopped, which are computed to the end as well.
  Several samples are copies of the prompt, since it has no other way. Its Llama (0.1.7) never hands
  the config's rope_theta to its rotary embedding and always takes 1e6; here the default is set to
  what the config says, or other numbers would come out.
"""

import json
import sys
from pathlib import Path

from peer import Compiles, give_back, jax_matmul, serve, status, timed, torch_matmul


class Ours:
    def __init__(self, folder, threads, rows):
        import jax

        from cipo_jax import LanguageModel, make_mesh
        from cipo_jax.config import ThinkConfig

        self.version = f"jax {jax.__version__}"
        self.compiles, self.matmul = Compiles(), jax_matmul
        mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
        think = ThinkConfig(prompt="{question}")
        model = LanguageModel.from_pretrained(folder, mesh, think=think)
        self.sampler = model.sampler(max_batch_size=rows)
        self.params = jax.block_until_ready(self.sampler.prepare(model.load_params()))
        self.key = jax.random.key(0)

    def run(self, prompts, lengths, samples):
        from cipo_jax import Request, SamplingJob, SamplingParams

        requests = [
            Request(prompt, item, max_new_tokens=length)
            for item, (prompt, length) in enumerate(zip(prompts, lengths, strict=True))
        ]
        temperature = 1.0 if samples > 1 else 0.0
        sampling_params = SamplingParams(max(lengths), stop_ids=(), temperature=temperature)
        job = SamplingJob(requests, sampling_params, self.key, num_samples=samples)
        made = self.sampler.sample(self.params, job)
        return [completion.ids for request in made for completion in request]


class Transformers:
    compiles, matmul = None, staticmethod(torch_matmul)

    def __init__(self, folder, threads, rows):
        import torch
        import transformers

        torch.set_num_threads(threads)
        transformers.logging.set_verbosity_error()
        self.version = f"transformers {transformers.__version__}, torch {torch.__version__}"
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.model.eval()
        # Nothing of the model's own settings is to fill in what a workload leaves open.
        self.model.generation_config = transformers.GenerationConfig()

    def run(self, prompts, lengths, samples):
        import torch
        from transformers import GenerationConfig, StoppingCriteria

        width = max(map(len, prompts))
        ids = torch.zeros(len(prompts), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        ends = width + torch.tensor(lengths).repeat_interleave(samples)

        class Lengths(StoppingCriteria):
            def __call__(self, input_ids, scores, **_):
                return input_ids.shape[1] >= ends

        how = {"do_sample": False}
        if samples > 1:
            how = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
        config = GenerationConfig(
            max_new_tokens=max(lengths), num_return_sequences=samples, pad_token_id=0, **how
        )
        torch.manual_seed(0)
        with torch.inference_mode():
            made = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=config,
                stopping_criteria=[Lengths()],
            )
        return [row[width:end] for row, end in zip(made.tolist(), ends.tolist(), strict=True)]


class IdsOnly:
    """Stands for a tokenizer: texts are lists of ids. No row has ids that are negative."""

    def encode(self, text, **_):
        return json.loads(text)

    def decode(self, ids, **_):
        return ""

    def bos_id(self):
        return None

    def eos_id(self):
        return -2

    def pad_id(self):
        return -1


class Tunix:
    def __init__(self, folder, threads, rows):
        from importlib.metadata import version

        import jax
        import jax.numpy as jnp
        from tunix.models.llama3 import model as llama
        from tunix.models.llama3 import params

        self.version = f"google-tunix {version('google-tunix')}, jax {jax.__version__}"
        self.compiles, self.matmul = Compiles(), jax_matmul
        fields = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        if fields["model_type"] != "llama":
            raise ValueError(f"only Llama is tried with Tunix, not {fields['model_type']}")
        rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
        if rope.get("rope_type", "default") != "default":
            raise ValueError(f"Tunix's Llama has no rope scaling ({rope['rope_type']})")
        theta = fields.get("rope_theta") or rope["rope_theta"]
        llama.apply_rope.__defaults__ = (theta,)
        heads, d_model = fields["num_attention_heads"], fields["hidden_size"]
        self.config = llama.ModelConfig(
            num_layers=fields["num_hidden_layers"],
            vocab_size=fields["vocab_size"],
            embed_dim=d_model,
            hidden_dim=fields["intermediate_size"],
            num_heads=heads,
            head_dim=fields.get("head_dim") or d_model // heads,
            num_kv_heads=fields.get("num_key_value_heads") or heads,
            rope_theta=theta,
            norm_eps=fields["rms_norm_eps"],
            weight_tying=bool(fields.get("tie_word_embeddings")),
        )
        self.model = params.create_model_from_safe_tensors(
            str(folder), self.config, dtype=jnp.float32
        )
        self.samplers = {}

    def sampler(self, slots):
        from tunix.generate.sampler import CacheConfig, Sampler

        if slots not in self.samplers:
            config = self.config
            cache = CacheConfig(slots, config.num_layers, config.num_kv_heads, config.head_dim)
            self.samplers[slots] = Sampler(self.model, IdsOnly(), cache)
        return self.samplers[slots]

    def run(self, prompts, lengths, samples):
        width = 1 << (max(map(len, prompts)) - 1).bit_length()  # What it pads to by itself, too.
        texts = [json.dumps(prompt) for prompt in prompts for _ in range(samples)]
        how = {"temperature": 1.0, "top_p": 1.0} if samples > 1 else {}
        steps = max(lengths)
        out = self.sampler(width + steps)(
            texts, max_generation_steps=steps, max_prompt_length=width, seed=0, **how
        )
        ends = [length for length in lengths for _ in range(samples)]
        return [row[:end].tolist() for row, end in zip(out.tokens, ends, strict=True)]


ENGINES = {"ours": Ours, "transformers": Transformers, "tunix": Tunix}


def about(engine):
    give_back()
    return {"version": engine.version, "resident": status("VmRSS")}


def answer(engine, workload):
    prompts, lengths, samples = (workload[k] for k in ("prompts", "lengths", "samples"))
    give_back()
    made, report = timed(engine.compiles, engine.run, prompts, lengths, samples)
    wanted = [length for length in lengths for _ in range(samples)]
    if [len(row) for row in made] != wanted:
        raise RuntimeError("rows have other lengths than was asked for")
    report["tokens"] = sum(wanted)
    return report | ({"ids": made} if workload["ids"] else {})


if __name__ == "__main__":
    name, folder, threads, rows = sys.argv[1:]
    serve(lambda: ENGINES[name](folder, int(threads), int(rows)), about, answer)
