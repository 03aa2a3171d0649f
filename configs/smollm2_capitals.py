"""CiPO with LoRA on a real pretrained model: SmolLM2-135M-Instruct forgets four capitals.

python benchmarks/fetch_smollm2.py models/smollm2
python -m cipo_jax unlearn --config=configs/smollm2_capitals.py --config.model.path=models/smollm2 --workdir=runs/capitals

SmolLM2 is not a reasoning model. With three worked examples in the prompt it writes a chain of thought
of a sentence or two, and its answer after "Answer:". The questions are those, of many, that it answers
correctly in that form; see docs/smollm2.md.
"""  # noqa: E501

from pathlib import Path

from cipo_jax.config import default_config, parse_arg

DATA = Path(__file__).parent / "capitals"
PROMPT = """\
<|im_start|>user
What is a baby horse called?<|im_end|>
<|im_start|>assistant
A baby horse is a foal.
Answer:

foal<|im_end|>
<|im_start|>user
Tom has 3 pens and buys 4 more. How many are there now?<|im_end|>
<|im_start|>assistant
Tom has 3 pens. He buys 4 more. 3 + 4 = 7.
Answer:

7<|im_end|>
<|im_start|>user
What is the capital of Ghana?<|im_end|>
<|im_start|>assistant
Ghana is a country in west Africa. Its capital city is Accra.
Answer:

Accra<|im_end|>
<|im_start|>user
{question}<|im_end|>
<|im_start|>assistant
"""


def get_config(arg=None):
    """The settings; it takes no argument."""
    parse_arg(arg)
    config = default_config()
    config.model.path = "models/smollm2"
    config.model.retrained = ""
    config.model.remat = "none"  # Activations of 135 M parameters fit in memory.
    config.think.prompt = PROMPT
    config.think.open = ""
    config.think.close = "Answer:"

    config.data.world = ""
    for role in ("forget", "retain", "reasoning"):
        for part in ("", "_valid", "_eval"):
            config.data[role + part] = str(DATA / f"{role}{part}.jsonl")

    config.data.valid_rows = 8

    config.lora.rank = 16
    config.lora.alpha = 32.0

    config.sampling.max_batch_size = 48
    config.sampling.max_new_tokens = 32
    config.eval.max_batch_size = 32
    config.eval.max_new_tokens = 40
    # So small a model names no other capital, but it reasons to one that the prompt names.
    config.counterfactual.backward_prompt = "{question}\nHint: {answer}"
    config.counterfactual.num_candidates = 4
    config.counterfactual.rounds = 2

    config.warmup.epochs = 3.0
    config.warmup.lr = 1e-3
    config.warmup.warmup_steps = config.train.warmup_steps = 1
    config.warmup.batch_size = 6
    config.warmup.retain_batch_size = 4
    config.warmup.reasoning_batch_size = 2
    config.cipo.iterations = 2
    config.selection.patience = 2
    config.cipo.num_samples = 1
    config.cipo.nll_weight = 0.3
    config.cipo.retain_weight = 2.0  # 60 facts represent all of its knowledge.
    config.train.epochs = 2.0
    config.train.lr = 1e-3
    config.train.batch_size = 4
    config.train.retain_batch_size = 4
    config.train.reasoning_batch_size = 2
    return config
