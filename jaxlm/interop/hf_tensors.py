"""Tensors of Hugging Face checkpoints: one table a family, their name <-> our path and layout, read in both directions.

Source: the modules of `transformers` (5.23), and the published files where these differ (GPT-2 has no `transformer.`
prefix on the hub; GPT-NeoX's head was renamed; Gemma 3's text model may lie inside one that sees images).

    our path (within a block)       theirs (Llama)                    layout
    attention/query/kernel (in,out) self_attn.q_proj.weight (out,in)  TRANSPOSED
"""

import dataclasses
import difflib
import enum
import re
from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np

from jaxlm.core.errors import CheckpointError
from jaxlm.models import DecoderConfig

Shape = tuple[int, ...]


class Layout(enum.Enum):
    """How a tensor of theirs holds ours."""

    SAME = enum.auto()
    TRANSPOSED = enum.auto()
    """A linear weight `(out, in)`."""
    COLUMNS = enum.auto()
    """Queries, keys and values side by side along the last axis (GPT-2)."""
    HEADS = enum.auto()
    """Rows head by head, queries, keys and values within each (GPT-NeoX)."""


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of theirs, `{i}` standing for the layer, and the leaf or leaves of ours that it holds."""

    theirs: str
    ours: tuple[str, ...]
    layout: Layout

    @property
    def per_layer(self) -> bool:
        return "{i}" in self.theirs

    def names(self, num_layers: int) -> list[str]:
        return [self.theirs.format(i=i) for i in range(num_layers)] if self.per_layer else [self.theirs]

    def shape(self, ours: Shape) -> Shape:
        """The shape of theirs, from that of a leaf of ours (without the layer axis)."""
        match self.layout:
            case Layout.SAME:
                return ours
            case Layout.TRANSPOSED:
                return ours[::-1]
            case Layout.COLUMNS:
                return (*ours[:-1], len(self.ours) * ours[-1])
            case Layout.HEADS:
                return (len(self.ours) * ours[-1], *ours[:-1])

    def split(self, theirs: np.ndarray, part: int, num_heads: int) -> np.ndarray:
        """Leaf `part` of ours out of a tensor of theirs: a view where strides can say it."""
        match self.layout:
            case Layout.SAME:
                return theirs
            case Layout.TRANSPOSED:
                return theirs.T
            case Layout.COLUMNS:
                size = theirs.shape[-1] // len(self.ours)
                return theirs[..., part * size : (part + 1) * size]
            case Layout.HEADS:
                by_head = theirs.reshape(num_heads, len(self.ours), -1, *theirs.shape[1:])[:, part]
                return by_head.reshape(-1, *theirs.shape[1:]).T

    def join(self, ours: Sequence[np.ndarray], num_heads: int) -> np.ndarray:
        """The inverse of `split`, from all parts."""
        match self.layout:
            case Layout.SAME:
                return ours[0]
            case Layout.TRANSPOSED:
                return ours[0].T
            case Layout.COLUMNS:
                return np.concatenate(ours, axis=-1)
            case Layout.HEADS:
                rows = [x.T.reshape(num_heads, -1, *x.shape[:-1]) for x in ours]
                return np.stack(rows, axis=1).reshape(-1, *ours[0].shape[:-1])


@dataclasses.dataclass(frozen=True)
class Table:
    """The tensors of a family; what a model's configuration leaves out of them (biases, a head) is not in its files.

    `renames`: patterns of older or nested names and what they are today. `ignored`: patterns of what is no weight.
    """

    tensors: tuple[Tensor, ...]
    renames: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()

    @property
    def head(self) -> str:
        return next(t.theirs for t in self.tensors if t.ours == ("head/kernel",))

    @property
    def embedding(self) -> str:
        return next(t.theirs for t in self.tensors if t.ours == ("embedding/table",))

    def rename(self, name: str) -> str | None:
        """Today's name of a tensor in a file; `None` for what is no weight."""
        for pattern, new in self.renames:
            name = re.sub(pattern, new, name)
        return None if any(re.search(pattern, name) for pattern in self.ignored) else name

    def present(self, shapes: Mapping[str, Shape]) -> list[tuple[Tensor, Shape]]:
        """The tensors that a model with these leaves has, with the shape of one of theirs.

        `shapes` maps our paths to shapes, both as in the whole tree but for the layers: `blocks/attention/...`, the
        layer axis taken off. Raises `CheckpointError` for leaves that the table does not know.
        """
        found = [(t, t.shape(shapes[t.ours[0]])) for t in self.tensors if t.ours[0] in shapes]
        unknown = set(shapes) - {path for t, _ in found for path in t.ours}
        if unknown:
            raise CheckpointError(f"parameters without a name in this family's files: {', '.join(sorted(unknown))}")
        return found


def compare(expected: Mapping[str, Shape], found: Mapping[str, Shape], where: str) -> None:
    """Raises one `CheckpointError` that lists every missing, unexpected and misshapen tensor; layers are summed up."""
    missing, extra = set(expected) - set(found), set(found) - set(expected)
    lines = []
    strangers = _by_layer(extra)
    for name, layers in _by_layer(missing).items():
        close = difflib.get_close_matches(name, strangers, n=1, cutoff=0.85)
        hint = f" (did it become {close[0]}?)" if close else ""
        lines.append(f"missing: {_spelled(name, layers)}{hint}")
    lines += [f"unexpected: {_spelled(name, layers)}" for name, layers in strangers.items()]
    wrong = {n for n in set(expected) & set(found) if expected[n] != found[n]}
    grouped: dict[tuple, list[str]] = {}
    for name in wrong:
        grouped.setdefault((found[name], expected[name]), []).append(name)
    for (got, wanted), names in sorted(grouped.items()):
        for name, layers in _by_layer(names).items():
            lines.append(f"misshapen: {_spelled(name, layers)}: {list(got)}, expected {list(wanted)}")
    if lines:
        counts = f"{len(missing)} missing, {len(extra)} unexpected, {len(wrong)} misshapen"
        raise CheckpointError(f"{where}: {counts} of {len(expected)} tensors:\n  " + "\n  ".join(lines))


def _by_layer(names: Collection[str]) -> dict[str, list[int]]:
    """Names with `{i}` in place of the layer, and the layers that have each."""
    grouped: dict[str, list[int]] = {}
    for name in sorted(names):
        layer = re.search(r"\.(\d+)\.", f".{name}")
        key = f".{name}".replace(f".{layer[1]}.", ".{i}.", 1)[1:] if layer else name
        grouped.setdefault(key, []).extend([int(layer[1])] if layer else [])
    return {key: sorted(layers) for key, layers in sorted(grouped.items())}


def _spelled(name: str, layers: Sequence[int]) -> str:
    """`model.layers.{0-29}.mlp.up_proj.weight`."""
    ranges: list[list[int]] = []
    for i in layers:
        if ranges and ranges[-1][1] == i - 1:
            ranges[-1][1] = i
        else:
            ranges.append([i, i])
    text = ",".join(str(a) if a == b else f"{a}-{b}" for a, b in ranges)
    return name.replace("{i}", text if len(layers) == 1 else f"{{{text}}}", 1)


def _linear(ours: str | tuple[str, ...], theirs: str, weight: Layout, bias: Layout = Layout.SAME) -> Iterable[Tensor]:
    paths = (ours,) if isinstance(ours, str) else ours
    yield Tensor(f"{theirs}.weight", tuple(f"{p}/kernel" for p in paths), weight)
    yield Tensor(f"{theirs}.bias", tuple(f"{p}/bias" for p in paths), bias)


def _norm(ours: str, theirs: str) -> Iterable[Tensor]:
    yield Tensor(f"{theirs}.weight", (f"{ours}/scale",), Layout.SAME)
    yield Tensor(f"{theirs}.bias", (f"{ours}/bias",), Layout.SAME)


_QKV = tuple(f"blocks/attention/{part}" for part in ("query", "key", "value"))


def _llama(*, sandwich: bool = False) -> tuple[Tensor, ...]:
    """Llama, Mistral, Qwen and Gemma. Gemma 2 and 3 call the norm before the feed-forward layer by another name."""
    layer = "model.layers.{i}"
    norms = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    if sandwich:
        norms |= {
            "attention_post_norm": "post_attention_layernorm",
            "mlp_norm": "pre_feedforward_layernorm",
            "mlp_post_norm": "post_feedforward_layernorm",
        }
    norms |= {"attention/query_norm": "self_attn.q_norm", "attention/key_norm": "self_attn.k_norm"}
    linears = {f"attention/{ours}": f"self_attn.{ours[0]}_proj" for ours in ("query", "key", "value", "out")}
    linears |= {f"mlp/{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")}
    return (
        Tensor("model.embed_tokens.weight", ("embedding/table",), Layout.SAME),
        *(t for o, h in norms.items() for t in _norm(f"blocks/{o}", f"{layer}.{h}")),
        *(t for o, h in linears.items() for t in _linear(f"blocks/{o}", f"{layer}.{h}", Layout.TRANSPOSED)),
        *_norm("final_norm", "model.norm"),
        Tensor("lm_head.weight", ("head/kernel",), Layout.TRANSPOSED),
    )


def _neox() -> tuple[Tensor, ...]:
    layer = "gpt_neox.layers.{i}"
    return (
        Tensor("gpt_neox.embed_in.weight", ("embedding/table",), Layout.SAME),
        *_norm("blocks/attention_norm", f"{layer}.input_layernorm"),
        *_norm("blocks/mlp_norm", f"{layer}.post_attention_layernorm"),
        *_linear(_QKV, f"{layer}.attention.query_key_value", Layout.HEADS, Layout.HEADS),
        *_linear("blocks/attention/out", f"{layer}.attention.dense", Layout.TRANSPOSED),
        *_linear("blocks/mlp/up", f"{layer}.mlp.dense_h_to_4h", Layout.TRANSPOSED),
        *_linear("blocks/mlp/down", f"{layer}.mlp.dense_4h_to_h", Layout.TRANSPOSED),
        *_norm("final_norm", "gpt_neox.final_layer_norm"),
        Tensor("embed_out.weight", ("head/kernel",), Layout.TRANSPOSED),
    )


def _gpt2() -> tuple[Tensor, ...]:
    layer = "transformer.h.{i}"
    return (
        Tensor("transformer.wte.weight", ("embedding/table",), Layout.SAME),
        Tensor("transformer.wpe.weight", ("positions/table",), Layout.SAME),
        *_norm("blocks/attention_norm", f"{layer}.ln_1"),
        *_norm("blocks/mlp_norm", f"{layer}.ln_2"),
        *_linear(_QKV, f"{layer}.attn.c_attn", Layout.COLUMNS, Layout.COLUMNS),
        *_linear("blocks/attention/out", f"{layer}.attn.c_proj", Layout.SAME),
        *_linear("blocks/mlp/up", f"{layer}.mlp.c_fc", Layout.SAME),
        *_linear("blocks/mlp/down", f"{layer}.mlp.c_proj", Layout.SAME),
        *_norm("final_norm", "transformer.ln_f"),
        Tensor("lm_head.weight", ("head/kernel",), Layout.TRANSPOSED),
    )


_NO_WEIGHTS = (r"rotary_emb\.inv_freq$", r"\.attn\.(masked_)?bias$", r"\.attention\.(masked_)?bias$")
_LLAMA = Table(_llama(), ignored=_NO_WEIGHTS)

TABLES: Mapping[str, Table] = {
    **{name: _LLAMA for name in ("llama", "mistral", "qwen2", "qwen3", "gemma")},
    "gemma2": Table(_llama(sandwich=True), ignored=_NO_WEIGHTS),
    "gemma3": Table(
        _llama(sandwich=True),
        renames=(
            (r"^(model\.language_model|language_model\.model)\.", "model."),
            (r"^language_model\.lm_head\.", "lm_head."),
        ),
        ignored=(*_NO_WEIGHTS, r"^(model\.)?(vision_tower|multi_modal_projector)\."),
    ),
    "gpt_neox": Table(_neox(), renames=((r"^lm_head\.", "embed_out."),), ignored=_NO_WEIGHTS),
    "gpt2": Table(_gpt2(), renames=((r"^(?=(wte|wpe|h|ln_f)\.)", "transformer."),), ignored=_NO_WEIGHTS),
}
"""By the family names of `jaxlm.interop.hf_config.FAMILIES`."""


def leaf_shapes(paths: Mapping[str, Shape], config: DecoderConfig) -> dict[str, Shape]:
    """Shapes of a parameter tree's leaves (`blocks/0/...`, one run) in the form that `Table.present` takes."""
    shapes = {}
    for path, shape in paths.items():
        if path.startswith("blocks/"):
            if shape[0] != config.num_layers:
                raise CheckpointError(f"{path} has {shape[0]} layers, the configuration {config.num_layers}")
            shapes[block_path(path)] = shape[1:]
        else:
            shapes[path] = shape
    return shapes


def block_path(path: str) -> str:
    """`blocks/0/mlp/up/kernel` without its run: `blocks/mlp/up/kernel`; other paths as they are."""
    return re.sub(r"^blocks/\d+/", "blocks/", path)
