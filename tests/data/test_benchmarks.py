"""Each published format is read as it is, damage is named with its place, and the real files have their known sizes."""

import gzip
import json
import os

import pytest

from jaxlm.core.errors import ConfigError, DataError
from jaxlm.data import benchmarks as B

GSM8K = [
    {"question": "Ann has 2 pens and buys 3. How many?", "answer": "2 + 3 = <<2+3=5>>5 pens.\n#### 5"},
    {"question": "How much is a thousand?", "answer": "It is\u2028so.\n#### 1,000"},
]
CODE = {
    "task_id": "Invented/0",
    "prompt": "def one():\n",
    "entry_point": "one",
    "canonical_solution": "    return 1\n",
    "test": "def check(candidate):\n    assert candidate() == 1\n",
}
PACK = CODE | {
    "declaration": "def one():\n",
    "buggy_solution": "    return 2\n",
    "bug_type": "value misuse",
    "failure_symptoms": "incorrect output",
    "docstring": "One.",
    "signature": "one() -> int",
    "instruction": "Write a function.",
    "example_test": "assert one() == 1",
}
XQUAD = {
    "version": "1.1",
    "data": [
        {
            "title": "Tea",
            "paragraphs": [
                {
                    "context": "Grüner Tee kommt aus China.",
                    "qas": [
                        {"id": "7", "question": "Woher?", "answers": [{"answer_start": 21, "text": "China"}]},
                    ],
                }
            ],
        }
    ],
}
WIKITEXT = " \n = Tea = \n \n Tea is <unk> . \n \n = = History = = \n \n Old . \n \n = Rice = \n \n A grain . \n"
CLINC = {split: [["hello", "greeting"], ["what", "oos"]] for split in ("train", "val", "oos_val")}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.delenv("JAXLM_DATA", raising=False)
    files = {
        "gsm8k/train.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in GSM8K),
        "mgsm/mgsm_de.tsv": "Wie viele?\t18\nWie teuer?\t5,600\n",
        "humaneval/HumanEval.jsonl": json.dumps(CODE) + "\n\n",
        "humaneval/HumanEval-RandomSpanInfillingLight.jsonl": json.dumps(CODE | {"suffix": "\nx = 1"}),
        "humaneval/humanevalpack_python.jsonl": json.dumps(PACK),
        "xquad/xquad.de.json": json.dumps(XQUAD),
        "text/wikitext2_test.txt": WIKITEXT,
        "intents/clinc150_small.json": json.dumps(CLINC),
        "intents/banking77_categories.json": json.dumps(["card_arrival", "top_up"]),
        "intents/banking77_test.csv": 'text,category\nWhere?,card_arrival\n"I ""paid"",\ntwice",top_up\n',
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def test_every_format(folder):
    assert [(p.answer, p.solution == row["answer"]) for p, row in zip(B.gsm8k("train", folder), GSM8K)] == [
        ("5", True),
        ("1000", True),
    ]
    assert B.mgsm("de", folder)[1] == B.MathProblem("Wie teuer?", "5600", language="de")
    assert B.humaneval(folder) == [B.CodeProblem(**CODE, suffix="")]
    assert B.humaneval_infilling("RandomSpanLight", folder)[0].suffix == "\nx = 1"
    assert B.humanevalpack(folder) == [B.PackProblem(**PACK, suffix="")]
    (question,) = B.xquad("de", folder)
    assert (question.title, question.answers, question.starts, question.language) == ("Tea", ("China",), (21,), "de")
    articles = B.wikitext2("test", folder)
    assert [a.title for a in articles] == ["Tea", "Rice"]
    assert "".join(a.text for a in articles) == WIKITEXT
    assert B.clinc150("oos_val", folder)[1] == B.Utterance("what", "oos")
    assert B.banking77("test", folder) == [
        B.Utterance("Where?", "card_arrival"),
        B.Utterance('I "paid",\ntwice', "top_up"),
    ]


def test_gzipped_files_and_the_environment_variable(folder, monkeypatch):
    file = folder / "mgsm/mgsm_de.tsv"
    (folder / "mgsm/mgsm_de.tsv.gz").write_bytes(gzip.compress(file.read_bytes()))
    file.unlink()
    monkeypatch.setenv("JAXLM_DATA", str(folder))
    assert len(B.mgsm("de")) == 2
    (folder / "mgsm/mgsm_de.tsv.gz").write_bytes(gzip.compress(b"x" * 999)[:-9])
    with pytest.raises(DataError, match=r"mgsm_de.tsv.gz: truncated or damaged gzip"):
        B.mgsm("de")


def test_what_is_missing_is_named_with_where_to_get_it(folder):
    with pytest.raises(DataError, match=r"gsm8k/test.jsonl .*/data/test.jsonl from .*openai/grade-school-math"):
        B.gsm8k("test", folder)
    with pytest.raises(DataError, match="environment variable JAXLM_DATA"):
        B.gsm8k("train")
    with pytest.raises(DataError, match="does not exist: .*nowhere"):
        B.gsm8k("train", folder / "nowhere")
    for call, message in (
        (lambda: B.gsm8k("tset", folder), "unknown split of GSM8K 'tset': did you mean 'test'"),
        (lambda: B.mgsm("xx", folder), "unknown language of MGSM 'xx'"),
        (lambda: B.humaneval_infilling("Single", folder), "did you mean 'SingleLine'"),
    ):
        with pytest.raises(ConfigError, match=message):
            call()


LOADERS = {
    "gsm8k/train.jsonl": lambda folder: B.gsm8k("train", folder),
    "mgsm/mgsm_de.tsv": lambda folder: B.mgsm("de", folder),
    "humaneval/HumanEval.jsonl": B.humaneval,
    "humaneval/humanevalpack_python.jsonl": B.humanevalpack,
    "xquad/xquad.de.json": lambda folder: B.xquad("de", folder),
    "text/wikitext2_test.txt": lambda folder: B.wikitext2("test", folder),
    "intents/clinc150_small.json": lambda folder: B.clinc150("val", folder),
    "intents/banking77_test.csv": lambda folder: B.banking77("test", folder),
}


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("gsm8k/train.jsonl", lambda t: t + "{", "train.jsonl line 3: malformed JSON"),
        ("gsm8k/train.jsonl", lambda t: t.replace("#### 5", "five"), "line 1: the answer"),
        ("gsm8k/train.jsonl", lambda t: t + "[]", "line 3: expected an object, got list"),
        ("mgsm/mgsm_de.tsv", lambda t: t + "a\tb\tc", "line 3: 3 tab-separated fields"),
        ("mgsm/mgsm_de.tsv", lambda t: t + "a\tviel", "line 3: the answer is 'viel'"),
        ("humaneval/HumanEval.jsonl", lambda t: t.replace("entry", "x"), "line 1: no field 'entry_point'"),
        ("humaneval/humanevalpack_python.jsonl", lambda t: t.replace('"One."', "1"), "'docstring' holds int"),
        ("xquad/xquad.de.json", lambda t: t.replace(": 21", ": 20"), r"qas\[0\]: the answer 'China' does not stand"),
        ("xquad/xquad.de.json", lambda t: t.replace("qas", "q"), r"paragraphs\[0\]: no list 'qas'"),
        ("xquad/xquad.de.json", lambda t: t[:-1], "line 1: malformed JSON"),
        ("text/wikitext2_test.txt", lambda t: "x", "no article"),
        ("intents/clinc150_small.json", lambda t: t.replace('"what", ', ""), r"val\[1\]"),
        ("intents/banking77_test.csv", lambda t: t + "a,b", "line 5: unknown category 'b'"),
        ("intents/banking77_test.csv", lambda t: t + '"a', "line 5: malformed CSV"),
    ],
)
def test_damage_is_named_with_its_place(folder, name, damage, message):
    file = folder / name
    file.write_text(damage(file.read_text(encoding="utf-8")), encoding="utf-8")
    with pytest.raises(DataError, match=message):
        LOADERS[name](folder)


def test_bytes_that_are_no_text_are_named_with_their_line(folder):
    (folder / "mgsm/mgsm_de.tsv").write_bytes(b"a\t1\nb\xff\t2\n")
    with pytest.raises(DataError, match="line 2: not UTF-8: byte 0xFF"):
        B.mgsm("de", folder)


@pytest.mark.skipif("JAXLM_DATA" not in os.environ, reason="JAXLM_DATA names no folder of benchmark files")
def test_the_published_files():
    assert (len(B.gsm8k("train")), len(B.gsm8k("test"))) == (7473, 1319)
    assert [len(B.mgsm(language)) for language in B.MGSM_LANGUAGES] == [250] * 11
    assert [p.answer for p in B.mgsm("en")] == [p.answer for p in B.gsm8k("test")[:250]]
    assert (len(B.humaneval()), len(B.humanevalpack())) == (164, 164)
    assert (len(B.humaneval_infilling()), len(B.humaneval_infilling("RandomSpanLight"))) == (1033, 164)
    for language in ("de", "en", "es", "hi", "ru", "zh"):
        questions = B.xquad(language)
        assert (len(questions), len({q.context for q in questions})) == (1190, 240)
    assert [len(B.wikitext2(split)) for split in ("valid", "test")] == [60, 60]
    assert [len(B.clinc150(split)) for split in ("train", "val", "test", "oos_test")] == [7500, 3000, 4500, 1000]
    assert len({u.intent for u in B.clinc150("train")}) == 150
    assert (len(B.banking77("train")), len(B.banking77("test")), len(B.banking77_intents())) == (10003, 3080, 77)
