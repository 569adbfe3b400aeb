"""From records to token examples: assistant-only loss weights, shifted targets, and what was too long.

An example is a dict of equally long arrays `inputs, targets, loss_weights`, as `jaxlm.data.packing.shift` makes them.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import numpy as np

from jaxlm.core.errors import ConfigError, DataError
from jaxlm.data.chat import ChatTemplate, Encoded, Message, stop_ids
from jaxlm.data.chat_records import ChatRecord, LabeledRecord, PreferenceRecord
from jaxlm.data.packing import Batch, shift
from jaxlm.data.tokenizers.protocol import Tokenizer

TRAIN_ON = ("replies", "last", "completion", "all")
TOO_LONG = ("drop", "truncate")
TrainOn = Literal["replies", "last", "completion", "all"]
TooLong = Literal["drop", "truncate"]


@dataclasses.dataclass(frozen=True)
class Counts:
    """What became of the records. `dropped`: longer than the context, or with no trained token left after
    truncation; `truncated`: longer and kept; `longest`: the pairs of the longest example before either."""

    records: int
    examples: int
    dropped: int
    truncated: int
    longest: int
    tokens: int
    trained_tokens: int

    def describe(self, length: int) -> str:
        """A sentence for the user."""
        return (
            f"{self.examples} examples from {self.records} records ({self.trained_tokens} of {self.tokens} tokens "
            f"trained); {self.dropped} dropped and {self.truncated} truncated at {length} tokens "
            f"(the longest has {self.longest})"
        )


@dataclasses.dataclass(frozen=True)
class Labeled:
    """Examples that begin with a prompt: `prompt_tokens` tokens of each are the prompt's, `labels` say if the
    completion is desirable."""

    examples: list[Batch]
    prompt_tokens: list[int]
    labels: list[bool]


def chat_examples(
    records: Iterable[ChatRecord],
    tokenizer: Tokenizer,
    template: ChatTemplate,
    *,
    length: int,
    train_on: TrainOn = "replies",
    too_long: TooLong = "drop",
) -> tuple[list[Batch], Counts]:
    """Examples of at most `length` pairs with the loss on what the assistant wrote, end-of-turn tokens included.

    `train_on`: all `replies`; the `last` reply; the `completion` of records that have a prompt; `all` tokens. Where a
    template renders earlier turns differently once others follow (dropped reasoning, say), so that a chat's beginning
    is not the beginning of the chat, each reply becomes an example of its own with what came before it.

    Raises `DataError` for a record that the template has no place for, and if nothing is left; `ConfigError` for a
    template that ends a reply with no special token.
    """
    if train_on not in TRAIN_ON:
        raise ConfigError(f"train_on is '{train_on}' (valid: {', '.join(TRAIN_ON)})")
    stop_ids(template, tokenizer)
    fit = _Fit(length, too_long)
    for record in records:
        fit.records += 1
        for tokens, weights in _located(record.where, _weighted_chats, record, tokenizer, template, train_on):
            fit.add([shift(tokens, weights)])
    return [group[0] for group in fit.kept], fit.counts()


def preference_examples(
    records: Iterable[PreferenceRecord],
    tokenizer: Tokenizer,
    template: ChatTemplate,
    *,
    length: int,
    too_long: TooLong = "drop",
) -> tuple[list[tuple[Batch, Batch]], Counts]:
    """(chosen, rejected) of each record, with weight 1 on the completion's replies; a pair is dropped together."""
    stop_ids(template, tokenizer)
    fit = _Fit(length, too_long)
    for record in records:
        fit.records += 1
        sides = []
        for completion in (record.chosen, record.rejected):
            tokens, weights, _ = _located(record.where, _completion, record.prompt, completion, tokenizer, template)
            sides.append(shift(tokens, weights))
        fit.add(sides)
    return [(chosen, rejected) for chosen, rejected in fit.kept], fit.counts()


def labeled_examples(
    records: Iterable[LabeledRecord],
    tokenizer: Tokenizer,
    template: ChatTemplate,
    *,
    length: int,
    too_long: TooLong = "drop",
) -> tuple[Labeled, Counts]:
    """Examples for KTO, with weight 1 on the completion's replies."""
    stop_ids(template, tokenizer)
    fit = _Fit(length, too_long)
    prompts, labels = [], []
    for record in records:
        fit.records += 1
        tokens, weights, start = _located(
            record.where, _completion, record.prompt, record.completion, tokenizer, template
        )
        if fit.add([shift(tokens, weights)]):
            prompts.append(start)
            labels.append(record.label)
    return Labeled([group[0] for group in fit.kept], prompts, labels), fit.counts()


class _Fit:
    """Keeps groups of examples that fit the context whole, or their beginnings, and counts."""

    def __init__(self, length: int, too_long: str):
        if length < 1:
            raise ConfigError(f"length is {length}, expected 1 or more")
        if too_long not in TOO_LONG:
            raise ConfigError(f"too_long is '{too_long}' (valid: {', '.join(TOO_LONG)})")
        self.length, self.too_long = length, too_long
        self.records = self.dropped = self.truncated = self.longest = 0
        self.kept: list[list[Batch]] = []

    def add(self, group: Sequence[Batch]) -> bool:
        longest = max(len(example["inputs"]) for example in group)
        self.longest = max(self.longest, longest)
        cut = [{name: x[: self.length] for name, x in example.items()} for example in group]
        keep = longest <= self.length or self.too_long == "truncate"
        if not keep or not all(example["loss_weights"].any() for example in cut):
            self.dropped += 1
            return False
        self.truncated += longest > self.length
        self.kept.append(cut)
        return True

    def counts(self) -> Counts:
        if not self.kept:
            raise DataError(
                f"no example is left of {self.records} records: {self.dropped} are longer than {self.length} tokens "
                f"(the longest has {self.longest}) or have nothing to train on"
            )
        examples = [example for group in self.kept for example in group]
        return Counts(
            records=self.records,
            examples=len(self.kept),
            dropped=self.dropped,
            truncated=self.truncated,
            longest=self.longest,
            tokens=sum(len(example["inputs"]) for example in examples),
            trained_tokens=int(sum((example["loss_weights"] > 0).sum() for example in examples)),
        )


def _weighted_chats(
    record: ChatRecord, tokenizer: Tokenizer, template: ChatTemplate, train_on: str
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Tokens and weights of a record: one example, or one for each reply."""
    messages = record.messages
    if train_on == "completion":
        if record.prompt_turns is None:
            raise DataError("train_on 'completion' needs records with a prompt and a completion")
        split = record.prompt_turns
        return [_completion(messages[:split], messages[split:], tokenizer, template)[:2]]
    replies = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    if train_on == "last":
        messages = messages[: replies[-1] + 1]
        return [_completion(messages[:-1], messages[-1:], tokenizer, template)[:2]]
    whole = template.encode(tokenizer, messages)
    if train_on == "all":
        return [(whole.ids, np.ones(len(whole.ids)))]
    beginnings = [messages[: i + 1] for i in replies]
    if all(_begins(whole, template.encode(tokenizer, chat)) for chat in beginnings[:-1]):
        return [(whole.ids, whole.assistant_mask)]
    return [_completion(chat[:-1], chat[-1:], tokenizer, template)[:2] for chat in beginnings]


def _completion(
    prompt: Sequence[Message], completion: Sequence[Message], tokenizer: Tokenizer, template: ChatTemplate
) -> tuple[np.ndarray, np.ndarray, int]:
    """Tokens, weights on the completion's replies alone, and the tokens before the first of these."""
    whole = template.encode(tokenizer, [*prompt, *completion])
    before = template.encode(tokenizer, prompt) if prompt else Encoded(whole.ids[:0], whole.assistant_mask[:0])
    # As many runs of the assistant's tokens at the beginning as the prompt has are the prompt's.
    begins = np.flatnonzero(np.diff(whole.assistant_mask.astype(np.int8), prepend=0) == 1)
    earlier = np.count_nonzero(np.diff(before.assistant_mask.astype(np.int8), prepend=0) == 1)
    if earlier >= len(begins):
        raise DataError("the chat template shows no reply of the completion")
    start = int(begins[earlier])
    weights = whole.assistant_mask & (np.arange(len(whole.ids)) >= start)
    return whole.ids, weights, start


def _begins(whole: Encoded, part: Encoded) -> bool:
    """Whether the chat begins with what the assistant wrote in the part, and what came before it."""
    end = int(np.flatnonzero(part.assistant_mask)[-1]) + 1 if part.assistant_mask.any() else 0
    return bool(np.array_equal(whole.ids[:end], part.ids[:end]))


def _located(where: str, function: Callable, *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
