"""CiPO on R-TOFU's forget10 with DeepSeek-R1-Distill-Llama-8B, all parameters trained.

python -m cipo_jax unlearn --config=configs/rtofu_r1_llama8b.py:/data/r-tofu --workdir=runs/1

The argument is the folder of R-TOFU's files (forget10.json, retain90.json, ...), `data/r-tofu` by
default. config.model.path should be the *target* model: the base fine-tuned on all of R-TOFU.
"""

from cipo_jax.config import long_reasoning_config


def get_config(arg=None):
    """The settings; `arg` is the folder of the data."""
    folder = arg or "data/r-tofu"
    config = long_reasoning_config()
    config.model.path = "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"
    config.data.forget = f"{folder}:forget10"
    config.data.retain = f"{folder}:retain90"
    # Answers are whole sentences: what a rollout gives away shows in their words, not as one fact.
    config.cipo.reject = "all"

    config.mesh.fsdp = 8
    config.mesh.data = -1
    config.train.lr = config.warmup.lr = 1e-5
    return config
