"""Checkpoint folders made by hand: safetensors files through the `safetensors` package, a byte-level tokenizer."""

import functools
import json
from pathlib import Path

import numpy as np
import tokenizers
from safetensors.numpy import load_file, save_file


@functools.cache
def tokenizer_definition() -> str:
    """A small byte-level `tokenizer.json` with ChatML's tokens."""
    engine = tokenizers.Tokenizer(tokenizers.models.BPE())
    engine.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=280,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    engine.train_from_iterator(["def read(path):\n    return the file in the path\n"] * 9, trainer)
    return engine.to_str()


def edit_config(folder: Path, *remove: str, **changes) -> None:
    """Changes keys of a `config.json`."""
    values = json.loads((folder / "config.json").read_text())
    values = {k: v for k, v in {**values, **changes}.items() if k not in remove}
    (folder / "config.json").write_text(json.dumps(values))


def edit_tensors(folder: Path, edit) -> None:
    """Rewrites a `model.safetensors` with what `edit` makes of its dict of arrays."""
    path = folder / "model.safetensors"
    arrays = {name: np.ascontiguousarray(x) for name, x in edit(load_file(path)).items()}
    save_file(arrays, path)
