"""Decoding: one state machine for all sampling, logit processors, text in and out, refill."""

from jaxlm.decoding.batches import complete
from jaxlm.decoding.ensemble import EnsembleStepper, StackedStepper
from jaxlm.decoding.generate import GenerationConfig, GenerationOutput, generate
from jaxlm.decoding.generator import GenerationState, Generator
from jaxlm.decoding.processors import (
    Appended,
    Bias,
    CountPenalty,
    Forbid,
    History,
    MinP,
    Processor,
    RepetitionPenalty,
    TopK,
    TopP,
)
from jaxlm.decoding.refill import Sample, generate_refilled, refilled
from jaxlm.decoding.stepper import DecoderStepper, Stepper
from jaxlm.decoding.teacher_rows import sample_rows
from jaxlm.decoding.text import Completion, Prompt, generate_text, stream_text

__all__ = [
    "Appended",
    "Bias",
    "Completion",
    "CountPenalty",
    "DecoderStepper",
    "EnsembleStepper",
    "Forbid",
    "GenerationConfig",
    "GenerationOutput",
    "GenerationState",
    "Generator",
    "History",
    "MinP",
    "Processor",
    "Prompt",
    "RepetitionPenalty",
    "Sample",
    "StackedStepper",
    "Stepper",
    "TopK",
    "TopP",
    "complete",
    "generate",
    "generate_refilled",
    "generate_text",
    "refilled",
    "sample_rows",
    "stream_text",
]
