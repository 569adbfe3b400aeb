"""A conversation: what the model sees of it, and what is kept."""

import jax
import pytest

from jaxlm.core.errors import DataError
from jaxlm.data.chat import Plain
from jaxlm.data.tokenizers import ByteTokenizer
from jaxlm.decoding import GenerationConfig
from jaxlm.decoding.chat import ChatSession
from jaxlm.models import Decoder
from jaxlm.testing import tiny_config


@pytest.fixture(scope="module")
def session():
    model = Decoder(tiny_config("llama", vocab_size=259, max_length=48))
    params = jax.jit(model.init)(jax.random.key(0))["params"]
    settings = GenerationConfig(max_new_tokens=8, temperature=0.0)
    return ChatSession(model, params, ByteTokenizer(), Plain(), settings, system="")


def test_turns_alternate_and_replies_are_kept(session):
    session.reset()
    reply = "".join(session.send("hello"))
    assert [m["role"] for m in session.messages] == (["user", "assistant"] if reply.strip() else [])
    session.reset()
    assert session.messages == []


def test_the_oldest_exchanges_leave_when_room_is_short(session):
    session.messages = [
        {"role": "user", "content": "a" * 20},
        {"role": "assistant", "content": "b" * 20},
        {"role": "user", "content": "c" * 20},
    ]
    seen = ByteTokenizer().decode(session._prompt())
    assert "a" not in seen
    assert "c" * 20 in seen
    session.reset()


def test_a_message_that_cannot_fit_is_refused_and_forgotten(session):
    session.reset()
    with pytest.raises(DataError, match="context is 48"):
        list(session.send("x" * 60))
    assert session.messages == []
