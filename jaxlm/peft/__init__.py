"""Parameter-efficient fine-tuning."""

from jaxlm.peft.lora import KERNELS, LoraConfig, adapted_axes, add_lora, is_lora, merge_lora, remove_lora
from jaxlm.peft.parametrizations import Parametrization, parametrize, restart, stop_bases

__all__ = [
    "KERNELS",
    "LoraConfig",
    "Parametrization",
    "add_lora",
    "adapted_axes",
    "is_lora",
    "merge_lora",
    "parametrize",
    "remove_lora",
    "restart",
    "stop_bases",
]
