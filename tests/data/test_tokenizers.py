"""One contract over every tokenizer, and what is particular to each member."""

import functools
import io
import json
import pickle
import struct
import tempfile
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers as hf
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from jaxlm.core.errors import ConfigError, DataError
from jaxlm.data.tokenizers import (
    ByteTokenizer,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    load_tokenizer,
    sentence_piece_model,
    token_byte_lengths,
    train_sentencepiece,
)
from jaxlm.testing.tokenizers import DigitGroupTokenizer, GreedyTokenizer

CORPUS = [
    "def read(path):\n    with open(path) as file:\n        return file.read()\n        # done\n\n\n",
    'class Row:\n\t"""The row of a table, <s> or </s>, <0x0A>."""\n\tname = "naïve café"\n',
    "the cat and the dog ran to the house  and  the end\r\n",
] * 30


@functools.cache
def sentence_piece(model_type="bpe"):
    with tempfile.TemporaryDirectory() as cache:
        vocab_size = {"bpe": 340, "unigram": 310}[model_type]
        return train_sentencepiece(CORPUS, vocab_size, model_type=model_type, cache=cache)


def byte_level_definition(**options):
    engine = hf.Tokenizer(hf.models.BPE())
    engine.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = hf.decoders.ByteLevel()
    engine.train_from_iterator(
        CORPUS,
        hf.trainers.BpeTrainer(
            vocab_size=330,
            initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=["<|endoftext|>", "<|im_start|>"],
            show_progress=False,
        ),
    )
    engine.add_tokens(["        "])
    for name, value in options.items():
        setattr(engine, name, value)
    return engine.to_str()


def byte_fallback_definition(prepend=False):
    """A Gemma-like (Llama-like with `prepend`) tokenizer.json from the SentencePiece model's vocabulary."""
    ours = sentence_piece()._processor
    vocab = {ours.id_to_piece(i): i for i in range(ours.vocab_size())}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in vocab
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab and not piece.startswith("<")
    ]
    engine = hf.Tokenizer(hf.models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    replace = hf.normalizers.Replace(" ", "▁")
    engine.normalizer = hf.normalizers.Sequence([hf.normalizers.Prepend("▁"), replace]) if prepend else replace
    engine.decoder = hf.decoders.Sequence(
        [hf.decoders.Replace("▁", " "), hf.decoders.ByteFallback(), hf.decoders.Fuse()]
    )
    engine.add_special_tokens(["<unk>", "<s>", "</s>", "<pad>"])
    return engine.to_str()


MEMBERS = {
    "byte": ByteTokenizer,
    "sentencepiece bpe": sentence_piece,
    "sentencepiece unigram": lambda: sentence_piece("unigram"),
    "hugging face byte-level": lambda: HuggingFaceTokenizer(byte_level_definition()),
    "hugging face byte fallback": lambda: HuggingFaceTokenizer(byte_fallback_definition()),
    "toy greedy": GreedyTokenizer,
    "toy digit groups": DigitGroupTokenizer,
}


@pytest.fixture(params=MEMBERS, scope="module")
def tokenizer(request):
    return MEMBERS[request.param]()


HARD = [
    "", " ", " a", "a ", "  ", "\n", "\r\n", "\t\t x", "\0", "a\0b", "▁", "a ▁b▁▁", "▅", "⁇", "\ufeffa",
    "<s>", "</s>", "<unk>", "<pad>", "<0x0A>", "<|endoftext|>", "<|im_start|>user", "<turn>", "e\u0301é",
    "Å\u212b\uff21\ufb01", "x" * 300, " " * 300, "12345 007", "日本語 🙂🏽", "        return",
    "a\u2028b\u00a0c", "\ufffd",
]  # fmt: skip
texts = st.text() | st.text(alphabet=" \n\t\r<s>/0xA▁é1a") | st.sampled_from(HARD)
anything = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])


def test_control_tokens_are_special_ids_by_their_spelling(tokenizer):
    assert set(tokenizer.control_tokens.values()) <= set(tokenizer.special_ids.values())
    for spelled, i in tokenizer.control_tokens.items():
        assert spelled not in ("bos", "eos", "pad")
        assert i not in tokenizer.encode(spelled)
    if isinstance(tokenizer, (HuggingFaceTokenizer, SentencePieceTokenizer)):
        assert set(tokenizer.control_tokens.values()) == set(tokenizer.special_ids.values())


@anything
@given(text=texts)
def test_text_survives_and_yields_no_special_id(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert not set(ids) & set(tokenizer.special_ids.values())
    assert all(0 <= i < tokenizer.vocab_size for i in ids)


@anything
@given(raw=st.binary() | texts.map(str.encode))
@example(raw=b"\xff\xfe\x80")
@example(raw="a▁b".encode()[:-2] + b"\xe2\x96")
@example(raw=b"\xed\xa0\x80 <s>")
def test_any_bytes_survive(tokenizer, raw):
    ids = tokenizer.encode(raw)
    assert tokenizer.decode_bytes(ids) == raw
    assert not set(ids) & set(tokenizer.special_ids.values())


@anything
@given(text=texts)
def test_spans_hold_the_bytes_of_their_tokens(tokenizer, text):
    ids, spans = tokenizer.encode_with_offsets(text)
    assert ids == tokenizer.encode(text)
    assert len(spans) == len(ids)
    covered = 0
    for token, (start, end) in zip(ids, spans):
        assert tokenizer.token_bytes(token) in text[start:end].encode()
        # Exactly the touched characters: without its first or its last one the span would be too short.
        assert end > start
        assert start <= covered <= end
        covered = end
    assert covered == len(text)


def test_tokens_of_one_character_share_its_span():
    ids, spans = ByteTokenizer().encode_with_offsets("aé🙂")
    assert ids == list("aé🙂".encode())
    assert spans == [(0, 1), (1, 2), (1, 2), (2, 3), (2, 3), (2, 3), (2, 3)]


def test_batches_equal_single_texts(tokenizer):
    batch = [*HARD, b"\xffab", *CORPUS[:3]]
    assert tokenizer.encode_batch(batch) == [tokenizer.encode(text) for text in batch]
    assert tokenizer.encode_batch([]) == []


def test_special_ids_are_ids_without_bytes(tokenizer):
    assert {"bos", "eos", "pad"} <= set(tokenizer.special_ids)
    for i in tokenizer.special_ids.values():
        assert 0 <= i < tokenizer.vocab_size
        assert tokenizer.token_bytes(i) == b""
    lengths = token_byte_lengths(tokenizer)
    assert lengths.dtype == np.int32
    assert lengths.shape == (tokenizer.vocab_size,)
    assert lengths[tokenizer.encode("the café 1234")].sum() == len("the café 1234".encode())


def test_lone_surrogates_are_refused(tokenizer):
    with pytest.raises(DataError, match="character 2 is the lone surrogate"):
        tokenizer.encode("ab\ud800")
    with pytest.raises(DataError, match="surrogate"):
        tokenizer.encode_batch(["fine", "ab\ud800"])


@pytest.mark.parametrize("name", [n for n in MEMBERS if "toy" not in n])
def test_saved_and_loaded_is_the_same(name, tmp_path):
    tokenizer = MEMBERS[name]()
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    copy = pickle.loads(pickle.dumps(tokenizer))  # how a copy reaches a worker process
    for other in (again, copy):
        assert type(other) is type(tokenizer)
        assert other.fingerprint == tokenizer.fingerprint
        assert other.special_ids == tokenizer.special_ids
        assert other.encode_batch(HARD) == tokenizer.encode_batch(HARD)


def test_fingerprints_differ():
    assert len({make().fingerprint for make in MEMBERS.values()}) == len(MEMBERS)
    definition = byte_level_definition()
    plain = HuggingFaceTokenizer(definition)
    assert plain.fingerprint != HuggingFaceTokenizer(definition, bos="<|im_start|>", eos="<|im_start|>").fingerprint


# SentencePiece


def test_training_is_cached_by_its_inputs(tmp_path, monkeypatch):
    first = train_sentencepiece(CORPUS, 330, cache=tmp_path)
    assert first.vocab_size == 330
    assert first.encode(CORPUS[0]) == train_sentencepiece(CORPUS, 330, cache=tmp_path / "other").encode(CORPUS[0])
    monkeypatch.setattr(sentencepiece.SentencePieceTrainer, "Train", lambda **_: pytest.fail("trained again"))
    monkeypatch.setenv("JAXLM_CACHE", str(tmp_path))
    assert train_sentencepiece(iter(CORPUS), 330).fingerprint == first.fingerprint
    with pytest.raises(pytest.fail.Exception, match="trained again"):
        train_sentencepiece(CORPUS + ["more"], 330)


def test_indentation_and_line_ends_have_pieces():
    tokenizer = sentence_piece()
    assert len(tokenizer.encode("        ")) == 1
    assert len(tokenizer.encode("\n")) == 1
    assert len(tokenizer.encode("\t")) == 1


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_long_texts_are_cut_without_effect(model_type):
    tokenizer = sentence_piece(model_type)
    long = "".join(CORPUS) + " " * 3000 + "end" + "x" * 3000
    assert len(tokenizer._parts(long)) > 5
    assert tokenizer.encode_batch([long]) == [tokenizer._processor.encode(long)]


def test_texts_are_not_cut_where_a_piece_may_cross():
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(CORPUS), model_writer=model, vocab_size=340, model_type="bpe", minloglevel=2,
        normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False,
        byte_fallback=True, split_by_whitespace=False,
    )  # fmt: skip
    tokenizer = SentencePieceTokenizer(model.getvalue())
    long = "".join(CORPUS)
    assert tokenizer.encode_batch([long]) == [tokenizer._processor.encode(long)]


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_impossible_vocabularies_name_the_limit(tmp_path, model_type):
    with pytest.raises(ConfigError, match=r"100000 is too large .* largest possible is \d+") as raised:
        train_sentencepiece(CORPUS, 100_000, model_type=model_type, cache=tmp_path)
    largest = int(str(raised.value).split()[-1])
    assert train_sentencepiece(CORPUS, largest, model_type=model_type, cache=tmp_path).vocab_size == largest
    with pytest.raises(ConfigError, match="largest possible"):
        train_sentencepiece(CORPUS, largest + 1, model_type=model_type, cache=tmp_path)
    with pytest.raises(ConfigError, match=r"100 is too small .* need \d+"):
        train_sentencepiece(CORPUS, 100, model_type=model_type, cache=tmp_path)
    with pytest.raises(DataError, match="empty"):
        train_sentencepiece([""], 300, cache=tmp_path)
    with pytest.raises(ConfigError, match="'bpe' or 'unigram'"):
        train_sentencepiece(CORPUS, 300, model_type="word", cache=tmp_path)


def test_a_sample_stays_within_its_size_and_depends_on_the_seed(tmp_path):
    from jaxlm.data.tokenizers.sentence_piece import _sample

    texts = [f"{i:04d} " * 100 for i in range(200)]
    samples = [_sample(texts, 10_000, seed) for seed in (0, 0, 1)]
    assert samples[0] == samples[1] != samples[2]
    assert all(9_000 < sum(map(len, s)) <= 10_000 for s in samples)
    assert samples[0] == sorted(samples[0])
    whole = "line\n" * 10_000
    assert "".join(_sample([whole], 1 << 20, 0)) == whole
    assert len("".join(_sample(["x" * 50_000], 1 << 20, 0))) == 50_000


@pytest.mark.parametrize(
    "change",
    [
        {"normalization_rule_name": "nmt_nfkc"},
        {"add_dummy_prefix": True},
        {"remove_extra_whitespaces": True},
        {"byte_fallback": False},
        {"eos_id": -1},
    ],
)
def test_models_that_change_text_are_refused(change):
    options = dict(
        normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False,
        byte_fallback=True, vocab_size=320, hard_vocab_limit=False, minloglevel=2, model_type="bpe",
    )  # fmt: skip
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(CORPUS), model_writer=model, **{**options, **change}
    )
    with pytest.raises(ConfigError, match="identity normalization|no byte pieces|no EOS"):
        SentencePieceTokenizer(model.getvalue())


# Hugging Face


def test_hugging_face_ids_equal_the_package(tmp_path):
    engine = hf.Tokenizer.from_str(byte_level_definition())
    tokenizer = HuggingFaceTokenizer(byte_level_definition())
    for text in CORPUS[:3]:
        assert tokenizer.encode(text) == engine.encode(text, add_special_tokens=False).ids
    ascii_text = "def the end):  return"
    encoding = engine.encode(ascii_text, add_special_tokens=False)
    assert tokenizer.encode_with_offsets(ascii_text) == (encoding.ids, encoding.offsets)


def test_hugging_face_roles(tmp_path):
    definition = byte_level_definition()
    tokenizer = HuggingFaceTokenizer(definition)
    end = tokenizer.special_ids["eos"]
    start = HuggingFaceTokenizer(definition, bos="<|im_start|>").special_ids["bos"]
    assert tokenizer.special_ids["pad"] == end != start
    (tmp_path / "tokenizer.json").write_text(definition)
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": {"content": "<|im_start|>"}, "eos_token": "<|endoftext|>", "pad_token": None})
    )
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        assert load_tokenizer(path).special_ids == {"bos": start, "eos": end, "pad": end}
    with pytest.raises(ConfigError, match="no token '<nothing>' for the role 'pad'"):
        HuggingFaceTokenizer(definition, pad="<nothing>")


def test_role_tokens_not_marked_special_cannot_be_forged():
    definition = json.loads(byte_level_definition())
    for token in definition["added_tokens"]:
        token["special"] = False
    tokenizer = HuggingFaceTokenizer(json.dumps(definition))
    ids = tokenizer.encode("a<|endoftext|>b")
    assert tokenizer.special_ids["eos"] not in ids
    assert tokenizer.decode(ids) == "a<|endoftext|>b"


def test_normalizing_tokenizers_give_the_package_s_spans():
    nfc = HuggingFaceTokenizer(byte_level_definition(normalizer=hf.normalizers.NFC()))
    decomposed = "cafe\u0301 end"
    assert nfc.decode(nfc.encode(decomposed)) == unicodedata.normalize("NFC", decomposed)
    ids, spans = nfc.encode_with_offsets(decomposed)
    assert len(ids) == len(spans)
    assert spans[-1][1] == len(decomposed)
    llama = HuggingFaceTokenizer(byte_fallback_definition(prepend=True))
    assert llama.decode(llama.encode("the")) == " the"


def test_unusable_definitions_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"not a tokenizer\.json"):
        HuggingFaceTokenizer("{}")
    word_piece = hf.Tokenizer(hf.models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    word_piece.add_special_tokens(["</s>"])
    with pytest.raises(ConfigError, match="WordPiece"):
        HuggingFaceTokenizer(word_piece.to_str())
    with pytest.raises(ConfigError, match="what ends a text"):
        HuggingFaceTokenizer(hf.Tokenizer(hf.models.WordPiece({"a": 1}, unk_token="a")).to_str())
    with pytest.raises(ConfigError, match="no tokenizer at"):
        load_tokenizer(Path(tmp_path, "absent"))
    (tmp_path / "jaxlm_tokenizer.json").write_text('{"kind": "bite"}')
    with pytest.raises(ConfigError, match="did you mean 'byte'"):
        load_tokenizer(tmp_path)


# Damaged files (found by fuzzing).

PRECOMPILED = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("jaxlm_tokenizer.json", "[]"),
        ("jaxlm_tokenizer.json", '{"kind": []}'),
        ("jaxlm_tokenizer.json", '{"kind": "sentencepiece"}'),
        ("jaxlm_tokenizer.json", "[" * 5000),
        ("jaxlm_tokenizer.json", b"\xff"),
        ("tokenizer.json", "{}"),
        ("tokenizer.json", json.dumps({"version": "1.0", "normalizer": PRECOMPILED})),  # a panic in the package
        ("tokenizer.json", b"\xff"),
        ("x.model", b""),
        ("x.model", b"\xff" * 99),
        ("x.model", b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\x7f"),
    ],
)
def test_damaged_tokenizer_files_are_refused_by_name(tmp_path, name, content):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises((ConfigError, DataError)):
        load_tokenizer(tmp_path / name if name == "x.model" else tmp_path)


def sentence_pieces(*pieces, rest=b""):
    """The bytes of a model of these (text, score, kind)."""
    out = b""
    for text, score, kind in pieces:
        raw = text.encode()
        body = b"\x0a" + bytes([len(raw)]) + raw + b"\x15" + struct.pack("<f", score) + b"\x18" + bytes([kind])
        out += b"\x0a" + bytes([len(body)]) + body
    return out + rest


UNKNOWN = ("<unk>", 0.0, 2)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (b"", "it has no pieces"),
        (sentence_pieces(("a", 0.0, 1)), "no unknown piece"),
        (sentence_pieces(UNKNOWN, ("", 0.0, 1)), "piece 1 has 0 characters"),
        (sentence_pieces(UNKNOWN, ("a", 0.0, 1), ("a", 0.0, 1)), "a piece twice"),
        (sentence_pieces(UNKNOWN, ("a", float("nan"), 1)), "the score of piece 1 is nan"),
        (sentence_pieces(UNKNOWN, ("a", 0.0, 9)), "unknown kind 9"),
        (sentence_pieces(UNKNOWN, ("<0xZZ>", 0.0, 6)), "the byte piece 1 is '<0xZZ>'"),
        (sentence_pieces(UNKNOWN, ("a", 0.0, 1), rest=b"\x1a\x06\x12\x04AAAA"), "identity normalization"),
        (sentence_pieces(UNKNOWN, ("a", 0.0, 1), rest=b"\x12\x02\x18\x04"), "its type is 4"),
        (sentence_pieces(UNKNOWN)[:-1], "is cut short"),
        (b"\x0b", "wire type 3"),
    ],
)
def test_models_that_break_what_sentencepiece_takes_for_granted_are_refused(model, said):
    with pytest.raises(ConfigError, match=said):
        SentencePieceTokenizer(model)


def test_the_vocabulary_is_read_as_the_package_reads_it():
    model = sentence_piece()._model
    pieces = sentence_piece_model.check(model)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert [p.text for p in pieces] == [processor.id_to_piece(i) for i in range(processor.vocab_size())]
    assert [p.score for p in pieces] == pytest.approx([processor.get_score(i) for i in range(len(pieces))])
    assert [p.kind == 6 for p in pieces] == [processor.is_byte(i) for i in range(len(pieces))]
