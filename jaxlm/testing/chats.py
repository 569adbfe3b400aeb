"""A tiny model in a folder, and chats small enough for it."""

from pathlib import Path
from typing import Any

import jax

from jaxlm.data.chat_records import ChatRecord, LabeledRecord, PreferenceRecord
from jaxlm.data.tokenizers import ByteTokenizer
from jaxlm.interop import huggingface
from jaxlm.models import Decoder
from jaxlm.testing.models import tiny_config
from jaxlm.training.runs import keep_tokenizer


def tiny_checkpoint(folder: Path) -> Path:
    """A random Llama on bytes, saved in `folder` as a Hugging Face checkpoint, its tokenizer beside it."""
    if not folder.exists():
        config = tiny_config("llama", vocab_size=259, max_length=64)
        keep_tokenizer(ByteTokenizer(), folder.parent / "tokenizer")
        huggingface.save(folder, config, jax.jit(Decoder(config).init)(jax.random.key(0))["params"])
    return folder


def toy_records(kind: str) -> list[Any]:
    """Sums and their results as records: `chat`, `pair` (the right result is preferred) or `labeled`."""
    def said(role: str, text: str) -> tuple[dict[str, str], ...]:
        return ({"role": role, "content": text},)

    found: list[Any] = []
    for a in range(4):
        for b in range(4):
            where, prompt, right = f"toy {a} {b}", said("user", f"{a}+{b}?"), said("assistant", str(a + b))
            if kind == "chat":
                found.append(ChatRecord((*prompt, *right), None, where))
            elif kind == "pair":
                found.append(PreferenceRecord(prompt, right, said("assistant", "no"), where))
            else:
                found += [LabeledRecord(prompt, right, True, where)]
                found += [LabeledRecord(prompt, said("assistant", "no"), False, where)]
    return found
