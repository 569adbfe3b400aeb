"""The command line of evaluation: any model, tasks and texts; wrong options are named before a model is loaded."""

import json

import pytest

from experiments import evaluate, runner
from jaxlm.data.tokenizers import HuggingFaceTokenizer
from jaxlm.decoding import GenerationConfig, complete
from jaxlm.evals import evaluate_task, find_task, generation, tasks
from jaxlm.evals.generation import Problem, exact_match
from jaxlm.evals.methods import EvaluationConfig, Generation, Task
from jaxlm.interop import Pretrained, huggingface
from jaxlm.scoring import TokenizerEncoding
from jaxlm.testing import tiny_decoder
from tests.evals.benchmark_files import write
from tests.interop.checkpoints import tokenizer_definition

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QUESTIONS = [{"question": f"{i} + 1?", "choices": ["1", "2", "3"], "answer": i} for i in range(3)]


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("JAXLM_DATA", str(write(tmp_path / "data")))


@pytest.fixture(scope="module")
def subject():
    model, params = tiny_decoder("llama", vocab_size=288, max_length=1024)
    tokenizer = HuggingFaceTokenizer(tokenizer_definition(), eos="<|endoftext|>")
    return Pretrained(model.config, params, tokenizer, TEMPLATE, (0, 2))


@pytest.fixture(scope="module")
def model(subject, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    huggingface.save(
        folder, subject.config, subject.params, subject.tokenizer, chat_template=TEMPLATE, stop_ids=subject.stop_ids
    )
    return str(folder)


@pytest.fixture
def questions(tmp_path):
    file = tmp_path / "questions.jsonl"
    file.write_text("\n".join(map(json.dumps, QUESTIONS)))
    return str(file)


def test_tasks_and_text_from_the_command_line(model, subject, questions, tmp_path, capsys):
    text, file = tmp_path / "note.txt", tmp_path / "result.json"
    text.write_text("the path in the file\n" * 30)
    words = ["--model", model, "--tasks", "multiple_choice,gsm8k", "wikitext", "--task_path", questions]
    words += ["--data.path", str(text), "--json", str(file)]
    words += ["--max_new_tokens", "4", "--num_shots", "0", "--limit", "2"]
    assert runner.execute_tool(evaluate, words) == 0
    shown = capsys.readouterr()
    for name in ("bits per byte", "acc_norm", "strict_match", "word_perplexity"):
        assert name in shown.out
    assert "gsm8k 2/2" in shown.err
    found = json.loads(file.read_text())
    assert found["model"] == model
    assert found["results"]["note"]["bytes"] == 630
    assert [found["tasks"][name]["num_examples"] for name in ("multiple_choice", "gsm8k", "wikitext")] == [2, 2, 1]
    settings = EvaluationConfig(limit=2)
    expected = evaluate_task("multiple_choice", subject, path=questions, config=settings).as_json()
    assert found["tasks"]["multiple_choice"]["metrics"]["brier"]["value"] == pytest.approx(
        expected["metrics"]["brier"]["value"], rel=1e-4
    )


def test_prompts_become_a_users_turn(model, subject, monkeypatch):
    """The template's ids, the beginning of the reply behind them; without the template the text's own ids."""
    given = []

    def record(stepper, params, tokenizer, prompts, *rest, **options):
        given.extend(map(list, prompts))
        return complete(stepper, params, tokenizer, prompts, *rest, **options)

    monkeypatch.setattr(generation, "complete", record)
    method = Generation(GenerationConfig(max_new_tokens=2, temperature=0), exact_match(str))
    monkeypatch.setitem(tasks._TASKS, "toy", Task("toy", lambda path: [Problem(" the file\n", "x", "def ")], method))
    words = ["--model", model, "--tasks", "toy"]
    for more in (["--chat_template", "True"], [], ["--add_bos", "True"]):
        assert runner.execute_tool(evaluate, [*words, *more]) == 0
    encode = subject.tokenizer.encode
    start, end = (subject.tokenizer.control_tokens[name] for name in ("<|im_start|>", "<|im_end|>"))
    turn = [start, *encode("user\nthe file"), end, *encode("\n"), start, *encode("assistant\n")]
    text = encode(" the file\ndef ")
    assert given == [[*turn, *encode("def ")], text, [TokenizerEncoding(subject.tokenizer).prefix, *text]]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "which model or run? give --model M"),
        (["--model", "m", "--checkpoint", "r"], "both are given"),
        (["--model", "m"], "on what? give tasks"),
        (["--model", "m", "--step", "3", "--tasks", "gsm8k"], "--step chooses a checkpoint of a run"),
        (["--model", "m", "--tasks", "gsm8k,gsm9k"], "no task 'gsm9k': did you mean 'gsm8k'"),
        (["--model", "m", "--tasks", "gsm8k,gsm8k"], "--tasks names gsm8k more than once"),
        (["--model", "m", "--tasks", "gsm8k", "--limits", "3"], "did you mean --limit?"),
        (["--model", "m", "--tasks", "perplexity"], "task 'perplexity' reads a text file"),
        (["--model", "m", "--tasks", "gsm8k", "--task_path", "x"], "--task_path: none of the tasks reads it"),
        (["--model", "m", "--tasks", "wikitext", "--chat_template", "True"], "none of the tasks generates"),
        (["--model", "m", "--tasks", "humaneval", "--num_samples", "5"], "num_samples is 5 at temperature 0"),
        (["--model", "m", "--tasks", "humaneval", "--num_shots", "1"], "given without solved examples"),
        (["--model", "m", "--tasks", "gsm8k", "--num_shots", "9"], "num_shots is 9; task 'gsm8k' has 5"),
        (["--model", "m", "--tasks", "gsm8k", "--batch_size", "0"], "batch_size is 0"),
        (["--model", "m", "--tasks", "mgsm_sw"], "get mgsm/mgsm_sw.tsv from"),
    ],
)
def test_wrong_options_are_named_before_a_model_is_loaded(words, message, capsys):
    assert runner.execute_tool(evaluate, words) == 2
    assert message in capsys.readouterr().err


def test_what_the_model_lacks_is_named_before_anything_runs(model, subject, tmp_path, capsys):
    bare = tmp_path / "bare"
    huggingface.save(bare, subject.config, subject.params, subject.tokenizer)
    assert runner.execute_tool(evaluate, ["--model", str(bare), "--tasks", "gsm8k", "--chat_template", "True"]) == 2
    assert "comes without a chat template" in capsys.readouterr().err
    huggingface.save(bare, subject.config, subject.params)
    assert runner.execute_tool(evaluate, ["--model", str(bare), "--tasks", "wikitext"]) == 2
    assert "task 'wikitext': the model comes without a tokenizer" in capsys.readouterr().err
    words = ["--model", model, "--tasks", "wikitext,humaneval", "--max_new_tokens", "1024"]
    assert runner.execute_tool(evaluate, words) == 2
    shown = capsys.readouterr()
    assert "task 'humaneval': generation.max_new_tokens is 1024, expected less than the context of 1024" in shown.err
    assert "wikitext" not in shown.out
    assert runner.execute_tool(evaluate, ["--model", str(tmp_path / "none"), "--tasks", "wikitext"]) != 0


def test_names_of_tasks_by_commas_or_spaces():
    config = evaluate.Config(model="m", tasks=("gsm8k,wikitext", "mgsm_de"))
    assert config.tasks == ("gsm8k", "wikitext", "mgsm_de")
    assert find_task(config.tasks[2]).name == "mgsm_de"
