"""CiPO on RETURN (facts about real people) with DeepSeek-R1-Distill-Llama-8B.

python -m cipo_jax unlearn --config=configs/return_r1_llama8b.py:/data/return --workdir=runs/return

The argument is a folder with forget.jsonl and retain.jsonl, `data/return` by default: the rows that
the model knows, by the papers' filter (arXiv 2604.15847), half of them to be forgotten. Rows to be
retained need a `cot`, which RETURN itself does not have: let the model write them (`sample`).
"""

from cipo_jax.config import long_reasoning_config


def get_config(arg=None):
    """The settings; `arg` is the folder of the data."""
    folder = arg or "data/return"
    config = long_reasoning_config()
    config.model.path = "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"
    config.data.forget = f"{folder}/forget.jsonl"
    config.data.retain = f"{folder}/retain.jsonl"

    config.mesh.fsdp = 8
    config.mesh.data = -1
    config.train.lr = config.warmup.lr = 1e-5
    return config
