"""Parameter-efficient fine-tuning."""

from jaxlm.peft.lora import KERNELS, LoraConfig, adapted_axes, add_lora, is_lora, merge_lora, remove_lora

__all__ = ["KERNELS", "LoraConfig", "add_lora", "adapted_axes", "is_lora", "merge_lora", "remove_lora"]
