"""NLL of refusals: direct_idk, answer_idk, reasoned_idk, tru."""

import dataclasses

from cipo_jax.settings import setting


@dataclasses.dataclass(frozen=True)
class RefusalConfig:
    """Refusals as targets; TRU (arXiv 2603.09980) adds gradient ascent on the data."""

    alpha: float = setting(0.1, "TRU: weight of gradient ascent on the data", 0.0)
    path: str = setting(
        "",
        "TRU, reasoned_idk: source of forget questions with cot and answer, as data.forget; empty "
        "for refusals that the model writes",
    )
