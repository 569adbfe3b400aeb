"""The same Llama twice: ours, and that of transformers with the same weights."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

    from jaxlm.models import DecoderConfig


@dataclasses.dataclass(frozen=True)
class Size:
    """The shape of the model. The default has 6.8 million parameters."""

    vocab_size: int = 4096
    layers: int = 6
    embed_dim: int = 256
    heads: int = 4
    mlp_dim: int = 688

    def decoder(self, max_length: int, **options: Any) -> "DecoderConfig":
        """Our configuration."""
        from jaxlm.models import DecoderConfig

        return DecoderConfig(
            self.vocab_size, self.layers, self.embed_dim, self.heads, self.mlp_dim, max_length=max_length, **options
        )

    def transformers(self, max_length: int) -> "torch.nn.Module":
        """A `LlamaForCausalLM` of this shape in float32, its weights random."""
        import torch
        from transformers import AutoModelForCausalLM, LlamaConfig

        config = LlamaConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.embed_dim,
            intermediate_size=self.mlp_dim,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            max_position_embeddings=max_length,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=None,
        )
        return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)


def write_weights(path: Path, size: Size, seed: int = 0) -> None:
    """Fresh parameters for both sides, by the names of ours."""
    import jax

    from jaxlm.core import trees
    from jaxlm.models import Decoder

    params = Decoder(size.decoder(1)).init(jax.random.key(seed))["params"]
    np.savez(path, **{name: np.asarray(leaf) for name, leaf in trees.named_leaves(params)})


def read_params(path: Path, config: "DecoderConfig") -> Any:
    """Those parameters as our tree."""
    import jax.numpy as jnp

    from jaxlm.core import trees
    from jaxlm.models import Decoder

    with np.load(path) as file:
        return trees.map_named(lambda name, _: jnp.asarray(file[name]), Decoder(config).abstract_params())


def load_into(model: "torch.nn.Module", path: Path) -> None:
    """Those parameters into a `LlamaForCausalLM`."""
    import torch

    with np.load(path) as file:
        state = {
            theirs: torch.from_numpy(np.ascontiguousarray(value.T))
            for ours in file.files
            for theirs, value in _renamed(ours, file[ours])
        }
    result = model.load_state_dict(state, strict=False)
    if result.missing_keys or result.unexpected_keys:
        raise ValueError(f"missing {result.missing_keys}, unexpected {result.unexpected_keys}")


_NAMES: Mapping[str, str] = {
    "attention/query": "self_attn.q_proj",
    "attention/key": "self_attn.k_proj",
    "attention/value": "self_attn.v_proj",
    "attention/out": "self_attn.o_proj",
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "mlp/gate": "mlp.gate_proj",
    "mlp/up": "mlp.up_proj",
    "mlp/down": "mlp.down_proj",
}


def _renamed(ours: str, value: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """Transformers' names of a parameter, each with a value that still has to be transposed."""
    module = ours.rsplit("/", 1)[0]
    if module.startswith("blocks/0/"):
        name = _NAMES[module.removeprefix("blocks/0/")]
        return [(f"model.layers.{i}.{name}.weight", layer) for i, layer in enumerate(value)]
    if module == "embedding":
        return [("model.embed_tokens.weight", value.T)]
    return [({"final_norm": "model.norm", "head": "lm_head"}[module] + ".weight", value)]
