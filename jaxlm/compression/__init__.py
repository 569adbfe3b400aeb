"""Fewer bytes for a model's weights."""

from jaxlm.compression.memory import MemoryReport, memory_report
from jaxlm.compression.quantize import QuantizeConfig, abstract_quantize, quantize, quantize_matrix

__all__ = ["MemoryReport", "QuantizeConfig", "abstract_quantize", "memory_report", "quantize", "quantize_matrix"]
