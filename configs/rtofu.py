"""CiPO on R-TOFU (facts about fictional authors) with a DeepSeek-R1 model.

python -m cipo_jax unlearn --config=configs/rtofu.py:model=llama8b,split=forget10 --workdir=runs/1

Not usable yet for a real benchmark run; a later version cures each of these:
- `task_id` in R-TOFU's files is ignored, so that a split reads the rows of all tasks as forget set.
- The leak rule misses most leaks of sentence-long answers, and R-TOFU's answers are sentences.
- The checkpoint is selected, and scored, on the training questions.

The argument has model (llama8b, qwen3_8b, qwen1p5b), split (forget01, forget05, forget10), lora
(adapters instead of all parameters) and data, the folder of R-TOFU's files: forget10.json,
retain90.json, ... config.model.path should be a *target* model: the base fine-tuned on all of
R-TOFU.
"""

from cipo_jax.config import long_reasoning_config, parse_arg

MODELS = {
    "llama8b": "deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
    "qwen3_8b": "deepseek-ai/DeepSeek-R1-0528-Qwen3-8B",
    "qwen1p5b": "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
}
RETAIN = {"forget10": "retain90", "forget05": "retain95", "forget01": "retain99"}


def get_config(arg=None):
    """The settings; see the module for the argument."""
    arg = parse_arg(arg, model=tuple(MODELS), split=tuple(RETAIN), lora=False, data="data/r-tofu")
    config = long_reasoning_config()
    config.model.path = MODELS[arg.model]
    config.data.forget = f"{arg.data}:{arg.split}"
    config.data.retain = f"{arg.data}:{RETAIN[arg.split]}"
    # Answers are sentences: their words show a leak, not a single fact.
    config.cipo.reject = "all"

    if arg.lora:
        # Adapters, on one device or several; the base parameters are frozen, in bfloat16.
        config.lora.rank = 16
        config.lora.alpha = 32.0
        config.lora.dropout = 0.05
        config.train.lr = config.warmup.lr = 1e-4
    else:
        config.mesh.fsdp = 8
        config.mesh.data = -1
        config.train.lr = config.warmup.lr = 1e-5
    return config
