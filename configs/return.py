"""CiPO on RETURN (facts about real people) with a DeepSeek-R1 model.

python -m cipo_jax unlearn --config=configs/return.py:data=/data/return --workdir=runs/return

Not usable yet for a real benchmark run; a later version cures each of these:
- The leak rule misses most leaks of sentence-long answers.
- The checkpoint is selected, and scored, on the training questions.

The argument has model (llama8b, qwen3_8b, qwen1p5b) and data, a folder with forget.jsonl and
retain.jsonl: the rows that the model knows, by the papers' filter (arXiv 2604.15847), half of them
to be forgotten. Rows to retain need a `cot`, which RETURN does not have: have the model write them
(`sample`).
"""

from cipo_jax.config import long_reasoning_config, parse_arg

MODELS = {
    "llama8b": "deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
    "qwen3_8b": "deepseek-ai/DeepSeek-R1-0528-Qwen3-8B",
    "qwen1p5b": "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
}


def get_config(arg=None):
    """The settings; see the module for the argument."""
    arg = parse_arg(arg, model=tuple(MODELS), data="data/return")
    config = long_reasoning_config()
    config.model.path = MODELS[arg.model]
    config.data.forget = f"{arg.data}/forget.jsonl"
    config.data.retain = f"{arg.data}/retain.jsonl"

    config.mesh.fsdp = 8
    config.mesh.data = -1
    config.train.lr = config.warmup.lr = 1e-5
    return config
