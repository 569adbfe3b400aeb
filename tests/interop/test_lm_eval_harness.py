"""`JaxLM` beside the harness's own `hf` class on one tiny Llama: needs lm_eval, torch and transformers."""

import json

import numpy as np
import pytest

from jaxlm.core.errors import ConfigError
from jaxlm.data.tokenizers import load_tokenizer
from jaxlm.interop import Pretrained
from jaxlm.models import DecoderConfig

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
    ours = JaxLM(Pretrained(*ported(theirs.model), load_tokenizer(folder), TEMPLATE), batch_size=4)
    return theirs, ours


def ported(model):
    """Our configuration and parameters of a Llama of `transformers`."""
    c = model.config
    weights = {name: w.detach().float().numpy() for name, w in model.state_dict().items()}

    def stacked(name, transpose=True):
        layers = [weights[f"model.layers.{i}.{name}.weight"] for i in range(c.num_hidden_layers)]
        return np.stack([w.T if transpose else w for w in layers])

    parts = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "o_proj"}
    block = {
        "attention": {ours: {"kernel": stacked(f"self_attn.{theirs}")} for ours, theirs in parts.items()},
        "mlp": {ours: {"kernel": stacked(f"mlp.{ours}_proj")} for ours in ("gate", "up", "down")},
        "attention_norm": {"scale": stacked("input_layernorm", transpose=False)},
        "mlp_norm": {"scale": stacked("post_attention_layernorm", transpose=False)},
    }
    params = {
        "blocks": [block],
        "embedding": {"table": weights["model.embed_tokens.weight"]},
        "final_norm": {"scale": weights["model.norm.weight"]},
        "head": {"kernel": weights["lm_head.weight"].T},
    }
    config = DecoderConfig(
        vocab_size=c.vocab_size,
        num_layers=c.num_hidden_layers,
        embed_dim=c.hidden_size,
        num_heads=c.num_attention_heads,
        num_kv_heads=c.num_key_value_heads,
        mlp_dim=c.intermediate_size,
        max_length=c.max_position_embeddings,
        norm_eps=c.rms_norm_eps,
    )
    return config, params


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
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    rng = np.random.default_rng(0)
    file = tmp_path / "items.jsonl"
    rows = []
    for _ in range(12):
        words = rng.choice(WORDS, 6).tolist()
        choices = [" ".join(rng.choice(WORDS, n)) for n in (1, 2, 3)]
        rows.append({"question": " ".join(words), "choices": choices, "answer": int(rng.integers(3))})
    file.write_text("\n".join(map(json.dumps, rows)))
    task = {
        "task": "local",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}, "cache_dir": str(tmp_path / "cache")},
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
            model=lm,
            tasks=[dict(task)],
            apply_chat_template=chat,
            num_fewshot=1,
            fewshot_as_multiturn=chat,
            bootstrap_iters=0,
            log_samples=True,
            random_seed=0,
        )
        for lm in pairs
    ]
    for name in ("acc,none", "acc_norm,none", "acc_mutual_info,none", "brier_score,none"):
        assert found[1]["results"]["local"][name] == pytest.approx(found[0]["results"]["local"][name], abs=1e-3)
    theirs, ours = ([[float(r[0][0]) for r in sample["resps"]] for sample in f["samples"]["local"]] for f in found)
    np.testing.assert_allclose(ours, theirs, atol=1e-3)


def test_the_harness_knows_it_by_name():
    from lm_eval.api.registry import get_model

    from jaxlm.interop.lm_eval import JaxLM

    assert get_model("jaxlm") is JaxLM
    with pytest.raises(ConfigError, match="model, params and tokenizer are needed"):
        JaxLM()
