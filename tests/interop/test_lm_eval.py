"""The adapter by itself; beside the harness and its `hf` class where they are installed."""

import dataclasses

import pytest

from jaxlm.core.errors import CheckpointError, ConfigError, DataError
from jaxlm.data.chat import chat_template
from jaxlm.data.tokenizers import ByteTokenizer
from jaxlm.decoding import DecoderStepper, GenerationConfig, generate_text
from jaxlm.interop import Pretrained
from jaxlm.interop.lm_eval import HarnessEncoding, HarnessModel, make_harness_model
from jaxlm.scoring import TokenizerEncoding, score_pairs, score_texts
from jaxlm.testing import GreedyTokenizer, tiny_decoder

# GreedyTokenizer has a control token "<turn>", id 2, and shares id 0 between BOS and EOS.
TOKENIZER = GreedyTokenizer()
PAIRS = [("the question", " ab"), ("", "x"), ("the  ", "abc"), ("the question", " a")]


@pytest.fixture(scope="module")
def subject():
    return tiny_decoder("llama", vocab_size=TOKENIZER.vocab_size, max_length=64)


@pytest.fixture(scope="module")
def harness(subject):
    return HarnessModel(*subject, TOKENIZER, batch_size=3)


class TestEncoding:
    def test_control_tokens_become_their_ids(self):
        encoding = HarnessEncoding(TOKENIZER)
        assert encoding.encode("the<turn>ab<turn>") == [*TOKENIZER.encode("the"), 2, *TOKENIZER.encode("ab"), 2]
        assert encoding.encode("<turn") == TOKENIZER.encode("<turn")
        assert encoding.encode("") == []

    def test_without_control_tokens(self):
        assert HarnessEncoding(ByteTokenizer()).encode("a<|b|>") == list(b"a<|b|>")

    def test_bos_is_not_doubled(self):
        class Spelled(ByteTokenizer):
            control_tokens = {"<s>": 256}

        encoding = HarnessEncoding(Spelled(), add_bos=True)
        assert encoding.encode("a") == [256, 97]
        assert encoding.encode("<s>a") == [256, 97]
        assert encoding.encode_plain("a") == [97]


class TestRequests:
    def test_loglikelihood(self, harness, subject):
        expected = score_pairs(*subject, TokenizerEncoding(TOKENIZER), PAIRS)
        for found, score in zip(harness.loglikelihood(PAIRS), expected, strict=True):
            assert found == (pytest.approx(score.log_likelihood, abs=1e-5), score.greedy)

    def test_loglikelihood_rolling(self, harness, subject):
        texts = ["the " * 50, "", "ab"]
        expected = score_texts(*subject, TokenizerEncoding(TOKENIZER), texts)
        found = harness.loglikelihood_rolling(texts)
        assert found == pytest.approx([score.log_likelihood for score in expected], abs=1e-4)

    def test_generate_until(self, harness, subject):
        requests = [("the", {"max_gen_toks": 6}), ("ab ab ab", {"max_gen_toks": 9}), ("", {"max_gen_toks": 6})]
        calls = []
        found = harness.generate_until(requests, lambda *call: calls.append(call))
        for (context, arguments), text in zip(requests, found, strict=True):
            config = GenerationConfig(max_new_tokens=arguments["max_gen_toks"], temperature=0)
            ids = TOKENIZER.encode(context) or [0]
            ((whole,),) = generate_text(DecoderStepper(subject[0]), subject[1], TOKENIZER, [ids], config)
            assert text == whole.text
        assert calls == [(2, 3), (3, 3)]

    def test_generation_ends_before_a_stop_string(self, harness):
        (whole,) = harness.generate_until([("the", {"max_gen_toks": 12})])
        stop = next(letter for letter in whole[1:] if letter.isascii())
        (cut,) = harness.generate_until([("the", {"max_gen_toks": 12, "until": ["never said", stop]})])
        assert cut == whole[: whole.index(stop)]

    def test_long_contexts_keep_their_end(self, harness):
        end = "ab " * 20
        arguments = {"max_gen_toks": 14}
        kept = harness.context_length - 14
        ids = TOKENIZER.encode("the " * 40 + end)[-kept:]
        (cut,) = harness.generate_until([("the " * 40 + end, arguments)])
        (plain,) = harness.generate_until([(TOKENIZER.decode(ids), arguments)])
        assert cut == plain

    def test_nothing_to_score_is_named(self, harness):
        with pytest.raises(DataError, match="request 1: the continuation adds no token"):
            harness.loglikelihood([("a", "x"), ("a", "")])


class TestArguments:
    @pytest.mark.parametrize(
        ("arguments", "expected"),
        [
            ({}, {"temperature": 0, "max_new_tokens": 256}),
            ({"temperature": 0.7}, {"temperature": 0.7}),
            ({"temperature": 0.7, "do_sample": False}, {"temperature": 0}),
            ({"do_sample": True, "top_k": 5}, {"temperature": 1, "top_k": 5}),
            ({"max_tokens": 3, "max_gen_toks": 4}, {"max_new_tokens": 4}),
            ({"max_completion_tokens": 3}, {"max_new_tokens": 3}),
            ({"until": "\n\n"}, {"stop": ("\n\n",)}),
            ({"until": ["", "Q:", "<turn>"]}, {"stop": ("Q:",)}),
        ],
    )
    def test_are_those_of_the_harness(self, harness, arguments, expected):
        config = harness.generation_request(arguments).config
        assert {name: getattr(config, name) for name in expected} == expected

    def test_control_tokens_stop_by_id(self, harness):
        assert harness.generation_request({"until": ["<turn>"]}).stop_ids == (0, 2)
        ended = dataclasses.replace(harness, stop_ids=(7,))
        assert ended.generation_request({}).stop_ids == (0, 7)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"tempreature": 1}, "'tempreature': did you mean 'temperature'"),
            ({"num_beams": 4}, "num_beams is 4, expected 1"),
            ({"until": [3]}, r"until is \[3\], expected texts"),
            ({"top_p": 2.0}, "top_p is 2.0"),
        ],
    )
    def test_bad_ones_are_named(self, harness, arguments, message):
        with pytest.raises(ConfigError, match=message):
            harness.generation_request(arguments)


class TestChat:
    MESSAGES = ({"role": "system", "content": "be"}, {"role": "user", "content": "hi"})

    class Turns:
        """Refuses a system message, as Gemma's template does."""

        def parts(self, messages, tokenizer, *, add_generation_prompt=False):
            from jaxlm.data.chat import Part

            if messages[0]["role"] == "system":
                raise DataError("no system")
            parts = [Part(f"<turn>{m['role']}\n{m['content'].strip()}\n") for m in messages]
            return [*parts, *[Part("<turn>assistant\n")] * add_generation_prompt]

    def test_renders_without_a_system_message_where_refused(self, harness):
        chat = dataclasses.replace(harness, chat=self.Turns())
        assert chat.apply_chat_template(self.MESSAGES) == "<turn>user\nhi\n<turn>assistant\n"

    def test_a_last_message_is_continued(self, harness):
        chat = dataclasses.replace(harness, chat=self.Turns())
        messages = [*self.MESSAGES[1:], {"role": "assistant", "content": "The answer is"}]
        text = chat.apply_chat_template(messages, add_generation_prompt=False)
        assert text == "<turn>user\nhi\n<turn>assistant\nThe answer is"

    def test_a_named_template(self, harness):
        chat = dataclasses.replace(harness, chat=chat_template("plain"))
        assert "hi" in chat.apply_chat_template(self.MESSAGES[1:])

    def test_a_template_of_the_model(self, subject):
        model, params = subject
        source = "{% for m in messages %}<turn>{{ m.role }}: {{ m.content }}{% endfor %}"
        pretrained = Pretrained(model.config, params, TOKENIZER, source, stop_ids=(2,))
        harness = make_harness_model(pretrained, batch_size=2)
        text = harness.apply_chat_template(self.MESSAGES)
        assert text == "<turn>system: be<turn>user: hi"
        assert harness.encoding.encode(text).count(2) == 2
        assert harness.stop_ids == (2,)

    def test_without_a_template(self, harness):
        with pytest.raises(ConfigError, match="without a chat template"):
            harness.apply_chat_template(self.MESSAGES)


def test_bad_sources_are_named(subject):
    model, params = subject
    with pytest.raises(ConfigError, match=r"model, params and tokenizer are needed .* \(given: \['model'\]\)"):
        make_harness_model(model=model)
    with pytest.raises(ConfigError, match="model beside a Pretrained"):
        make_harness_model(Pretrained(model.config, params, TOKENIZER), model=model)
    with pytest.raises(ConfigError, match="a dict to evaluate, expected"):
        make_harness_model({"model": model})
    with pytest.raises(CheckpointError, match="no package 'smollm_3'"):
        make_harness_model("package:smollm_3")
    with pytest.raises(ConfigError, match="the model comes without a tokenizer"):
        make_harness_model(Pretrained(model.config, params))
    with pytest.raises(ConfigError, match="batch_size is 0"):
        make_harness_model(Pretrained(model.config, params, TOKENIZER), batch_size=0)
