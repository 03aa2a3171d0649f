"""DPO from the data to fixed targets: idk_dpo, altpo."""

import dataclasses

from cipo_jax.settings import setting


@dataclasses.dataclass(frozen=True)
class PreferenceConfig:
    """IDK-DPO (arXiv 2401.06121) and AltPO (arXiv 2409.13474)."""

    beta: float = setting(0.1, "DPO's beta", above=0.0)
    num_alternates: int = setting(5, "AltPO: alternate answers to each forget question", 1)
