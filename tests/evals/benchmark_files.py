"""A folder of invented benchmark files in the publishers' formats."""

import json
from pathlib import Path

GSM8K = [
    {"question": "Ann has 2 pens and buys 3. How many?", "answer": "2 + 3 = <<2+3=5>>5 pens.\n#### 5"},
    {"question": "How much is a thousand?", "answer": "It is so.\n#### 1,000"},
]
CODE = {
    "task_id": "Invented/0",
    "prompt": 'def one(xs):\n    """The first.\n    """\n',
    "entry_point": "one",
    "canonical_solution": "    return xs[0]\n",
    "test": "def check(candidate):\n    assert candidate([1, 2]) == 1\n",
}
PACK = CODE | {
    "test": "\n\n" + CODE["test"] + "\ncheck(one)",
    "declaration": "def one(xs):\n",
    "buggy_solution": "    return xs[1]\n",
    "bug_type": "value misuse",
    "failure_symptoms": "incorrect output",
    "docstring": "The first.",
    "signature": "one(xs)",
    "instruction": "Write a Python function `one(xs)`:\nThe first.\n",
    "example_test": "assert one([1]) == 1",
}
XQUAD = {
    "context": "Grüner Tee kommt aus China.",
    "qas": [{"id": "7", "question": "Woher?", "answers": [{"answer_start": 21, "text": "China"}]}],
}
WIKITEXT = " \n = Tea = \n \n It 's the drink 's ( good ) name , 3 @,@ 000 . \n \n = = Old = = \n \n \" So \" . \n"
INTENTS = ["card_arrival", "top_up", "exchange_rate"]


def write(folder: Path) -> Path:
    """Writes the files and returns the folder."""
    train = [[f"{word} {intent}", intent] for intent in INTENTS for word in ("my", "this")]
    banking = "text,category\n" + "".join(f"{text},{intent}\n" for text, intent in train)
    files = {
        "gsm8k/train.jsonl": "".join(json.dumps(GSM8K[0]) + "\n" for _ in range(5)),
        "gsm8k/test.jsonl": "".join(json.dumps(row) + "\n" for row in GSM8K),
        "mgsm/mgsm_de.tsv": "Wie viele?\t18\nWie teuer?\t5,600\n",
        "humaneval/HumanEval.jsonl": f"{json.dumps(CODE)}\n" * 2,
        "humaneval/humanevalpack_python.jsonl": json.dumps(PACK) + "\n",
        "xquad/xquad.de.json": json.dumps({"data": [{"title": "Tee", "paragraphs": [XQUAD]}]}),
        "text/wikitext2_test.txt": WIKITEXT,
        "intents/clinc150_small.json": json.dumps({"train": train, "test": train[::-1]}),
        "intents/banking77_categories.json": json.dumps(INTENTS),
        "intents/banking77_train.csv": banking,
        "intents/banking77_test.csv": banking,
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder
