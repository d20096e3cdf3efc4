"""PEFT's configuration of adapters, as adapter_config.json and diffusers' metadata have it."""

import math
import re
from collections.abc import Mapping

from dtrak_jax.checks import one_of, pattern
from dtrak_jax.models.lora import Adapters, Scales

FIXED = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "fan_in_fan_out": (False, None),
    # Others (pissa, olora, corda, loftq, lora_ga, mica) change the base's weights.
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
}
"""Fields of PEFT's configuration, and the values that adapters here imply."""

READ = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
IGNORED = (
    *("auto_mapping", "base_model_name_or_path", "revision", "peft_version"),
    *("task_type", "inference_mode", "runtime_config", "lora_dropout"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("megatron_core", "qalora_group_size", "eva_config", "ensure_weight_tying"),
)
"""Fields without effect on an adapter whose tensors are given."""


def check_settings(source, settings):
    """Raises a ValueError unless settings are those of plain adapters."""
    for field, value in settings.items():
        if field in FIXED:
            one_of(f"{source}: {field}", value, FIXED[field])
        elif field not in (*READ, *IGNORED) and value:
            raise ValueError(
                f"{source}: {field} is {value!r}; adapters with this setting compute "
                "something else than LoRA, and cannot be represented."
            )
    for field in ("rank_pattern", "alpha_pattern"):
        for key in settings.get(field) or {}:
            pattern(f"{source}: {field}", key)


def scale_of(path, settings: Mapping, module: str, rank: int) -> float:
    """Returns a module's scale as PEFT 0.21 computes it; 1 without settings."""
    if not settings:
        return 1.0

    def setting(name, patterns, default):
        for key, value in (settings.get(patterns) or {}).items():
            if re.match(rf"(.*\.)?({key})$", module):
                return value
        return settings.get(name, default)

    expected = setting("r", "rank_pattern", 8)
    if expected != rank:
        raise ValueError(
            f"{path}: {module} has rank {rank}, and by its configuration {expected}."
        )
    alpha = setting("lora_alpha", "alpha_pattern", 8)
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def settings_of(adapters: Adapters, scales: Scales) -> dict:
    """Returns adapters' settings as PEFT has them; others than the first by patterns."""
    ranks = {module: parts["down"].shape[-1] for module, parts in adapters.items()}
    alphas = {module: scales[module] * rank for module, rank in ranks.items()}
    r, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    return {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{m}": rank for m, rank in ranks.items() if rank != r},
        "alpha_pattern": {f"^{m}": a for m, a in alphas.items() if a != alpha},
        "target_modules": sorted(adapters),
        "init_lora_weights": "gaussian",
        "bias": "none",
        "use_dora": False,
        "use_rslora": False,
        "fan_in_fan_out": False,
    }
