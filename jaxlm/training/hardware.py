"""Peak arithmetic speed of chips, where it is published, and the share of it that a run uses."""

PEAK_BFLOAT16_FLOPS = {
    # Google Cloud TPU system architecture pages.
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    # NVIDIA data sheets, dense (without sparsity).
    "A100": 312e12,
    "H100": 989e12,
    "H200": 989e12,
}
"""Peak bfloat16 operations per second of one chip, by the start or a part of JAX's `device_kind`."""


def peak_flops(device_kind: str) -> float | None:
    """The chip's published peak, or `None` if it is not in the table (CPUs have none)."""
    for name in sorted(PEAK_BFLOAT16_FLOPS, key=len, reverse=True):
        if device_kind.startswith(name) or f" {name}" in device_kind or f"-{name}" in device_kind:
            return PEAK_BFLOAT16_FLOPS[name]
    return None


def model_flops_utilization(
    tokens_per_second: float, flops_per_token: float, device_kind: str, num_devices: int
) -> float | None:
    """Share of the devices' peak that goes into the operations the model must do (MFU, arXiv 2204.02311)."""
    peak = peak_flops(device_kind)
    return None if peak is None else tokens_per_second * flops_per_token / (peak * num_devices)
