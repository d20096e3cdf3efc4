"""The scheduler_config.json of diffusers, which tells how its networks were trained."""

from typing import Any

from etils import epath

from dtrak_jax.checks import at_least, between, check_fields, one_of, positive
from dtrak_jax.files import at, read_json

DIFFUSERS_FILE = "scheduler_config.json"

FLOW = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")

_STABLE_DIFFUSION = """
DPMSolverSDE HeunDiscrete KDPM2AncestralDiscrete KDPM2Discrete LCM TCD
"""
STABLE_DIFFUSION = tuple(f"{name}Scheduler" for name in _STABLE_DIFFUSION.split())
"""Schedulers whose betas, where a file does not tell, are those of Stable Diffusion."""

_CLASSES = """
DDPM DDIM PNDM DDIMInverse DDIMParallel DDPMParallel DEISMultistep DPMSolverMultistep
DPMSolverMultistepInverse DPMSolverSinglestep EulerAncestralDiscrete EulerDiscrete
LMSDiscrete SASolver UniPCMultistep
"""
CLASSES = (
    *(f"{name}Scheduler" for name in _CLASSES.split()),
    *STABLE_DIFFUSION,
    *FLOW,
)
"""Schedulers of networks that were trained with betas, or by flow matching.

Euler's, Heun's and the like sample along x + sigma eps, which is x_t divided by
sqrt(alpha_bar_t): what their network is given is x_t. Those of Karras et al. 2022 (EDM,
KarrasVe), of consistency models and of CogVideoX are not among them.
"""

CHOICES = {
    "_class_name": CLASSES,
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "prediction_type": ("epsilon", "v_prediction", "sample"),
    "predict_epsilon": (True,),
    "rescale_betas_zero_snr": (False, True),
    "timestep_type": ("discrete",),
    "use_flow_sigmas": (False,),
    "sigma_min": (None,),
    "sigma_max": (None,),
}
"""Fields that decide the noise and the prediction, and the values that they may have.

The first value is that of a file which does not have the field.
"""

NUMBERS = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02}

OF_FLOW = {
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "use_dynamic_shifting": False,
    "invert_sigmas": False,
}
"""Fields of flow matching. A shift that depends on the size of a picture is a matter of
sampling; the schedule is then without a shift, as that of diffusers is."""

_SAMPLING = """
algorithm_type base_image_seq_len base_shift clip_sample clip_sample_range
dynamic_thresholding_ratio disable_corrector eta euler_at_final final_sigmas_type
flow_shift interpolation_type lambda_min_clipped lower_order_final
max_image_seq_len max_shift noise_sampler_seed original_inference_steps predict_x0
predictor_order corrector_order sample_max_value set_alpha_to_one shift_terminal
skip_prk_steps solver_order solver_p solver_type steps_offset stochastic_sampling
tau_func tensor_format thresholding time_shift_type timestep_scaling timestep_spacing
timestep_values use_beta_sigmas use_dynamic_shifting use_exponential_sigmas
use_karras_sigmas use_lu_lambdas variance_type
"""
SAMPLING = tuple(_SAMPLING.split())
"""Fields that say how to sample, not how noise was added in training."""


def find_scheduler(folder: epath.PathLike) -> epath.Path | None:
    """Returns the scheduler_config.json that belongs to a folder of diffusers, if any.

    The folder is a pipeline's, with `scheduler` in it; a scheduler's; or a network's,
    with `scheduler` beside it.
    """
    folder = at(folder)
    paths = [folder / "scheduler" / DIFFUSERS_FILE, folder / DIFFUSERS_FILE]
    if (folder / "config.json").is_file():
        paths.append(folder.parent / "scheduler" / DIFFUSERS_FILE)
    return next((path for path in paths if path.is_file()), None)


def read_scheduler(folder: epath.PathLike) -> dict[str, Any]:
    """Returns the settings of `CHOICES` and `NUMBERS`, or for flow matching `OF_FLOW`.

    Raises:
      FileNotFoundError: there is no scheduler_config.json.
      ValueError: a field or its value has no counterpart in a `Schedule`.
    """
    path = find_scheduler(folder)
    if path is None:
        raise FileNotFoundError(
            f"{at(folder)} has no scheduler/{DIFFUSERS_FILE} and no {DIFFUSERS_FILE}; "
            "it must be the folder of a diffusers pipeline or scheduler, or of a "
            "network with the folder `scheduler` beside it."
        )
    saved = read_json(path)
    kind = saved.get("_class_name", CLASSES[0])
    one_of(f"{path}: _class_name", kind, CLASSES)
    if kind in FLOW:
        return _flow_settings(path, saved)
    settings = {field: allowed[0] for field, allowed in CHOICES.items()}
    settings |= NUMBERS | {"trained_betas": None}
    if kind in STABLE_DIFFUSION:
        settings |= {"beta_start": 8.5e-4, "beta_end": 0.012}
    if kind in ("LCMScheduler", "TCDScheduler"):
        settings["beta_schedule"] = "scaled_linear"
    check_fields(str(path), saved, {*settings, *SAMPLING})
    settings |= saved
    for field, allowed in CHOICES.items():
        one_of(f"{path}: {field}", settings[field], allowed)
    at_least(f"{path}: num_train_timesteps", settings["num_train_timesteps"], 1)
    between(f"{path}: beta_start", settings["beta_start"], 1e-12, 0.999)
    between(f"{path}: beta_end", settings["beta_end"], settings["beta_start"], 0.999)
    return settings


def _flow_settings(path: epath.Path, saved: dict[str, Any]) -> dict[str, Any]:
    """Returns the settings of flow matching; see `read_scheduler`."""
    check_fields(str(path), saved, {"_class_name", *OF_FLOW, *SAMPLING})
    settings = OF_FLOW | saved
    at_least(f"{path}: num_train_timesteps", settings["num_train_timesteps"], 1)
    positive(f"{path}: shift", settings["shift"])
    one_of(f"{path}: use_dynamic_shifting", settings["use_dynamic_shifting"], (0, 1))
    one_of(f"{path}: invert_sigmas", settings["invert_sigmas"], (False,))
    return settings | {"prediction_type": "flow"}
