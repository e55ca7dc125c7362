"""Bytes that a finetuning job takes, known before anything is allocated.

The parts are those that the executor allocates: an adapter with gradients and optimizer state in
float32 (float64 for a float64 model), its working copy in the model's dtype, the saved tensors of
each sample by the pruned reverse graph, its keys and values, the gradient at the hidden state, the
accumulators of the gradients of keys and values, and the temporaries of one window. `ablation` sets
the variants of FlexLLM's memory figure (arXiv 2402.18789 §8; sheet §2.3) side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from weft.base.errors import ConfigError
from weft.cost.shapes import ModelShape, dtype_bytes
from weft.graph.adapter_spec import AdapterSpec, BypassTarget, LayerWidths, resolve_targets
from weft.graph.layer_graph import LayerGraph, LayerOptions, build_layer_graph
from weft.graph.pruning import BackwardNeeds, Remat, backward_needs


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneBytes:
    """What one job takes on one device, part by part."""

    adapter: int
    """Trained weights; where the model's dtype is narrower, a copy in it beside the masters."""
    gradients: int
    optimizer: int
    activations: int
    """Saved tensors of all samples in flight."""
    kv: int
    """Keys and values of all samples in flight, in whole pages."""
    accumulators: int
    """Gradients of keys and values of the layers that a backward is in."""
    hidden_gradients: int
    """Gradients at a layer's border, one row a token."""
    workspace: int
    """Temporaries of one window; they are gone between iterations."""

    @property
    def total(self) -> int:
        """Everything."""
        return sum(getattr(self, part.name) for part in fields(self))

    @property
    def held(self) -> int:
        """Without the temporaries of an iteration."""
        return self.total - self.workspace


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneSetting:
    """What a job's bytes depend on, beside the model and the adapter.

    Raises:
        ConfigError: a count below 1.
    """

    dtype: str
    """Of the model."""
    seq_len: int
    """Tokens of the longest sample."""
    num_samples: int = 1
    """Samples that hold state at once."""
    window: int = 256
    """Most tokens of a backward window."""
    remat: Remat = Remat.PRUNED
    qk_norm: bool = False
    optimizer_values: int = 2
    """Numbers that the optimizer keeps for each parameter: 2 for AdamW, 1 for SGD's momentum."""
    page_tokens: int = 16
    is_window_major: bool = False

    def __post_init__(self) -> None:
        for name in ("seq_len", "num_samples", "window", "page_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")

    @property
    def master_bytes(self) -> int:
        """Of one trained number and of one accumulated gradient."""
        return max(4, dtype_bytes(self.dtype))


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerKeep:
    """One layer of a job: its operators and what its backward needs."""

    graph: LayerGraph
    needs: BackwardNeeds
    targets: tuple[BypassTarget, ...]


def layer_widths(shape: ModelShape) -> LayerWidths:
    """In and out features of the linears of a model's layers."""
    return LayerWidths(
        hidden=shape.hidden_size,
        query=shape.num_heads * shape.head_dim,
        kv=shape.num_kv_heads * shape.head_dim,
        ffn=shape.ffn_size,
    )


def layers_kept(
    shape: ModelShape, targets: Sequence[BypassTarget], setting: FinetuneSetting
) -> dict[int, LayerKeep]:
    """What each layer keeps; layers below the lowest trained one are absent."""
    options = LayerOptions(widths=layer_widths(shape), qk_norm=setting.qk_norm)
    by_layer: dict[int, list[BypassTarget]] = {}
    for target in targets:
        by_layer.setdefault(target.layer, []).append(target)
    lowest = min(by_layer)
    kept: dict[int, LayerKeep] = {}
    for layer in range(lowest, shape.num_layers):
        own = tuple(by_layer.get(layer, ()))
        graph = build_layer_graph(options, own)
        needs = backward_needs(graph, needs_input_grad=layer > lowest, remat=setting.remat)
        kept[layer] = LayerKeep(graph=graph, needs=needs, targets=own)
    return kept


def finetune_bytes(
    shape: ModelShape, adapter: AdapterSpec, setting: FinetuneSetting
) -> FinetuneBytes:
    """Price a job before it is admitted.

    Raises:
        ConfigError: the adapter matches no module of the model.
    """
    widths = layer_widths(shape)
    targets = resolve_targets(adapter, num_layers=shape.num_layers, widths=widths)
    num_params = sum(target.num_params for target in targets)
    kept = layers_kept(shape, targets, setting)
    element, master = dtype_bytes(setting.dtype), setting.master_bytes
    tokens = setting.seq_len * setting.num_samples
    saved_bits = sum(
        keep.needs.saved_bits_per_token(keep.graph.widths, 8 * element) for keep in kept.values()
    )
    reading = sum(keep.needs.reads_pages for keep in kept.values())
    live = reading if setting.is_window_major else min(1, reading)
    paged = -(-setting.seq_len // setting.page_tokens) * setting.page_tokens
    return FinetuneBytes(
        adapter=num_params * (master if element == master else master + element),
        gradients=num_params * master,
        optimizer=num_params * master * setting.optimizer_values,
        activations=-(-saved_bits * tokens // 8),
        kv=paged * setting.num_samples * shape.kv_bytes_per_token(setting.dtype),
        accumulators=live * setting.seq_len * 2 * widths.kv * master,
        hidden_gradients=tokens * widths.hidden * element,
        workspace=_workspace(shape, kept, setting),
    )


def _workspace(shape: ModelShape, kept: dict[int, LayerKeep], setting: FinetuneSetting) -> int:
    """The largest window of any layer: recomputed tensors, gradients, attention's scores."""
    element = dtype_bytes(setting.dtype)
    window = min(setting.window, setting.seq_len)
    most = 0
    for keep in kept.values():
        again = sum(keep.graph.widths[name] for name in keep.needs.recomputed)
        # Of the gradients, the two widest neighbours live at once: gate and up from act.
        gradients = sorted((keep.graph.widths[name] for name in keep.needs.gradients), reverse=True)
        scores = 0
        if keep.needs.reads_pages:
            # Probabilities and their gradients, of one window against the whole sample.
            scores = 2 * shape.num_heads * setting.seq_len * setting.master_bytes
        most = max(most, (again + sum(gradients[:3])) * element + scores)
    return window * most


# ---- FlexLLM's memory figure ----

SHEET_BYTES = {
    "conventional": (84_557_168_640, 84_557_168_640, 97_978_941_440),
    "+ graph pruning": (21_474_836_480, 21_474_836_480, 28_185_722_880),
    "+ rematerialization": (16_106_127_360, 21_474_836_480, 20_132_659_200),
    "+ token-level finetuning": (12_499_025_920, 12_834_570_240, 12_750_684_160),
}
"""Activation bytes of the figure for LoRA, bottleneck adapter and (IA)³ on a 70 B model with 1,024
tokens. Source: the artifact's plot script, sheet §2.3."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AblationRow:
    """One variant of the memory figure."""

    variant: str
    activation_bytes: int
    saving: float
    """Against the first variant, in [0, 1]."""
    widths: dict[str, float]
    """What a token keeps in a layer within the stack: tensor -> elements."""


def ablation(
    shape: ModelShape, adapter: AdapterSpec, setting: FinetuneSetting
) -> tuple[AblationRow, ...]:
    """Activation bytes of the four variants of FlexLLM's memory figure.

    Conventional: every forward tensor and its gradient live for the whole sequence, the attention
    probabilities among them, as a runtime does that allocates a region and a gradient region for
    each tensor. Pruning and rematerialization drop tensors; whole-sequence backward still holds the
    gradients of the layer that it is in; token-level finetuning holds those of one window.
    """
    widths = layer_widths(shape)
    targets = resolve_targets(adapter, num_layers=shape.num_layers, widths=widths)
    element = dtype_bytes(setting.dtype)
    rows: list[AblationRow] = []
    for variant in SHEET_BYTES:
        by_layer = [
            _variant_widths(variant, keep, shape, setting)
            for keep in _variant_layers(variant, shape, targets, setting).values()
        ]
        held = sum(sum(kept.values()) for kept in by_layer) * setting.seq_len * element
        held += _transient_bytes(variant, shape, setting)
        first = rows[0].activation_bytes if rows else held
        rows.append(
            AblationRow(
                variant=variant,
                activation_bytes=int(held),
                saving=1 - held / first,
                widths=by_layer[-1],
            )
        )
    return tuple(rows)


def _variant_layers(
    variant: str, shape: ModelShape, targets: Sequence[BypassTarget], setting: FinetuneSetting
) -> dict[int, LayerKeep]:
    is_pruned_only = variant == "+ graph pruning"
    remat = Remat.NONE if is_pruned_only else Remat.PRUNED
    settled = replace(setting, remat=remat)
    return layers_kept(shape, targets, settled)


def _variant_widths(
    variant: str, keep: LayerKeep, shape: ModelShape, setting: FinetuneSetting
) -> dict[str, float]:
    if variant == "conventional":
        kept = {name: 2.0 * width for name, width in keep.graph.widths.items()}
        kept["attention scores"] = kept["attention probabilities"] = (
            1.0 * shape.num_heads * setting.seq_len
        )
        return kept
    bits = 8 * dtype_bytes(setting.dtype)
    kept = {
        name: keep.graph.widths[name] * (1 / bits if encoding == "sign-bits" else 1.0)
        for name, encoding in keep.needs.saved.items()
    }
    if keep.needs.reads_pages:
        kept |= {name: float(keep.graph.widths[name]) for name in sorted(keep.graph.in_pages)}
    return kept


def _transient_bytes(variant: str, shape: ModelShape, setting: FinetuneSetting) -> int:
    """Gradients that live while one layer is worked on; the conventional variant counts its own."""
    if variant == "conventional":
        return 0
    widths = layer_widths(shape)
    element = dtype_bytes(setting.dtype)
    tokens = setting.window if variant.endswith("finetuning") else setting.seq_len
    per_token = (3 * widths.ffn + widths.hidden + widths.query) * element
    per_token += 2 * shape.num_heads * setting.seq_len * element
    accumulators = 2 * widths.kv * setting.master_bytes * setting.seq_len
    return tokens * per_token + accumulators + setting.seq_len * widths.hidden * element
