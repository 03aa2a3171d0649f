"""The engines that training.py compares; each runs in a process of its own, alone or waiting.

    python benchmarks/training_peers.py ENGINE FOLDER THREADS

Reads a job from the first line of stdin, as JSON: the pairs as ids, and the settings of loss and
optimizer. Of the lines that follow, "step" makes one update step, "matmul" measures the library's
limit; each is answered with a line of JSON. All work in float32, with AdamW without decay, and clip
the global norm of the gradient.

- ours, ours-none, ours-full: `LanguageModel.train_step` of a `PreferenceObjective`, as a run of
  this package uses it, with remat "names", "none" or "full". The reference's log-probabilities come
  from a `Scorer`, once.
- torch: DPO's formula as it is usually written in torch: one forward pass over chosen and rejected
  rows, logits of all tokens, their log-softmax, and of that the entries of the labels. The
  reference's log-probabilities were computed once. No checkpointing: all activations are kept.
- torch-ref: the same with a second model, which computes them at every step.
- trl: the loss of `trl.DPOTrainer` itself, with `precompute_ref_log_probs` and without gradient
  checkpointing, which is off here because it takes time. It computes its metrics too.
- trl-default: the same with TRL's defaults: a second model, and gradient checkpointing.

The steps of torch around the loss are the same in all four: backward, `clip_grad_norm_`, fused
AdamW, gradients set to None.
"""

import json
import sys
import tempfile

from peer import Compiles, give_back, jax_matmul, serve, status, timed, torch_matmul


class Ours:
    def __init__(self, folder, threads, job, remat="names"):
        import jax
        import numpy as np

        from cipo_jax import AdamW, LanguageModel, PreferenceObjective, Schedule, make_mesh
        from cipo_jax.config import ThinkConfig
        from cipo_jax.data.batches import PadShape, TokenizedExample, collate_pairs

        self.version = f"jax {jax.__version__}, remat {remat!r}"
        self.compiles, self.matmul = Compiles(), jax_matmul
        mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
        model = LanguageModel.from_pretrained(
            folder, mesh, remat=remat, think=ThinkConfig(prompt="{question}")
        )
        objective = PreferenceObjective("dpo", job["beta"])
        optimizer = AdamW(job["b1"], job["b2"], max_grad_norm=job["max_grad_norm"])
        self.train_step = model.train_step(objective, optimizer)
        chosen, rejected = (
            [TokenizedExample(pair["prompt"], pair[side]) for pair in job["pairs"]]
            for side in ("chosen", "rejected")
        )
        rows = [row for pair in zip(chosen, rejected, strict=True) for row in pair]
        shape, params = PadShape.fitting(rows), model.init_trainable()
        scores = model.scorer(len(rows)).token_logps(params, rows, shape)
        self.batch = {
            "pairs": collate_pairs(chosen, rejected, shape),
            "ref": np.array([score.sum() for score in scores], np.float32).reshape(-1, 2),
        }
        self.state = jax.block_until_ready(
            self.train_step.init(params, schedule=Schedule(lr=job["lr"]), donate=True)
        )

    def step(self):
        import jax

        batch = self.train_step.put(self.batch)
        self.state, metrics = jax.block_until_ready(self.train_step(self.state, batch))
        return float(metrics["loss"])


def padded(rows):
    """Ids, attention mask and completion mask of (prompt, completion) rows, padded on the right."""
    import torch

    width = max(len(prompt) + len(completion) for prompt, completion in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    seen, completed = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, (prompt, completion) in enumerate(rows):
        end = len(prompt) + len(completion)
        ids[row, :end] = torch.tensor([*prompt, *completion])
        seen[row, :end] = 1
        completed[row, len(prompt) : end] = 1
    return {"input_ids": ids, "attention_mask": seen, "completion_mask": completed}


def open_model(folder, threads):
    import torch
    import transformers

    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


class Torch:
    compiles, matmul = None, staticmethod(torch_matmul)

    def __init__(self, folder, threads, job, reference=False):
        import torch
        import transformers

        self.version = f"torch {torch.__version__}, transformers {transformers.__version__}"
        self.job = job
        self.model = open_model(folder, threads)
        # Chosen rows first, then the rejected ones, as TRL has them.
        self.inputs = padded(
            [
                (pair["prompt"], pair[side])
                for side in ("chosen", "rejected")
                for pair in job["pairs"]
            ]
        )
        self.reference, self.cached = None, None
        self.prepare(folder, threads, reference)
        self.model.train()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=job["lr"],
            betas=(job["b1"], job["b2"]),
            weight_decay=0.0,
            fused=True,
        )

    def prepare(self, folder, threads, reference):
        import torch

        if reference:
            self.reference = open_model(folder, threads).eval().requires_grad_(False)
        else:
            self.model.eval()
            with torch.no_grad():
                self.cached = self.sums(self.model)

    def sums(self, model):
        """Log-probabilities of the completions."""
        import torch

        ids, mask = self.inputs["input_ids"], self.inputs["completion_mask"][:, 1:]
        seen = self.inputs["attention_mask"]
        logits = model(input_ids=ids, attention_mask=seen, use_cache=False).logits[:, :-1]
        logps = torch.log_softmax(logits, dim=-1)
        labeled = logps.gather(-1, ids[:, 1:, None]).squeeze(-1)
        return (labeled * mask).sum(dim=1)

    def loss(self):
        import torch

        sums, reference = self.sums(self.model), self.cached
        if self.reference is not None:
            with torch.no_grad():
                reference = self.sums(self.reference)
        chosen, rejected = (sums - reference).chunk(2)
        return -torch.nn.functional.logsigmoid(self.job["beta"] * (chosen - rejected)).mean()

    def step(self):
        import torch

        loss = self.loss()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.job["max_grad_norm"])
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()


class Trl(Torch):
    def prepare(self, folder, threads, reference):
        import transformers
        import trl
        from datasets import Dataset

        class AlreadyIds(trl.DPOTrainer):
            def _prepare_dataset(self, dataset, *_):
                return dataset

        self.version += f", trl {trl.__version__}"
        self.kept = tempfile.TemporaryDirectory()
        rows = [
            {f"{name}_ids": pair[name] for name in ("prompt", "chosen", "rejected")}
            for pair in self.job["pairs"]
        ]
        settings = trl.DPOConfig(
            output_dir=self.kept.name,
            use_cpu=True,
            bf16=False,
            report_to="none",
            beta=self.job["beta"],
            max_length=None,
            per_device_train_batch_size=len(rows),
            gradient_checkpointing=reference,
            precompute_ref_log_probs=not reference,
        )
        self.trl = AlreadyIds(
            model=self.model,
            args=settings,
            train_dataset=Dataset.from_list(rows),
            processing_class=transformers.AutoTokenizer.from_pretrained(folder),
        )
        self.model = self.trl.model
        if reference:
            self.model.gradient_checkpointing_enable()  # `train` does so, which is not called here.
        self.inputs = self.trl.data_collator(list(self.trl.train_dataset))

    def loss(self):
        return self.trl.compute_loss(self.model, self.inputs)


ENGINES = {
    "ours": Ours,
    "ours-none": lambda *how: Ours(*how, remat="none"),
    "ours-full": lambda *how: Ours(*how, remat="full"),
    "torch": Torch,
    "torch-ref": lambda *how: Torch(*how, reference=True),
    "trl": Trl,
    "trl-default": lambda *how: Trl(*how, reference=True),
}


def faults():
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def answer(engine, _):
    """One step, and what it took."""
    give_back()
    resident, faulted = status("VmRSS"), faults()
    loss, report = timed(engine.compiles, engine.step)
    report |= {"loss": loss, "resident": resident, "faults": faults() - faulted}
    give_back()
    return report


def main():
    name, folder, threads = sys.argv[1:]
    job = json.loads(sys.stdin.readline())

    def about(engine):
        give_back()
        library = "jax" if name.startswith("ours") else "torch"
        return {"version": engine.version, "library": library}

    serve(lambda: ENGINES[name](folder, int(threads), job), about, answer)


if __name__ == "__main__":
    main()
