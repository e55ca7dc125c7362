"""What Hypothesis draws for finetuning: adapters of every kind, and windows."""

from __future__ import annotations

from hypothesis import strategies as st

from weft.graph.adapter_spec import SUB_LAYERS, AdapterKind, AdapterSpec

LINEAR_NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Of the modules that LoRA and (IA)³ attach to."""


@st.composite
def adapter_specs(draw: st.DrawFn, num_layers: int = 3) -> AdapterSpec:
    """Any kind on any subset of modules and layers."""
    kind = draw(st.sampled_from(AdapterKind))
    names = tuple(map(str, SUB_LAYERS)) if kind is AdapterKind.BOTTLENECK else LINEAR_NAMES
    modules = draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
    layers = draw(st.lists(st.integers(0, num_layers - 1), min_size=1, unique=True))
    feedforward = draw(st.lists(st.sampled_from(names), unique=True))
    targets: tuple[str, ...] | str = tuple(modules)
    if kind is AdapterKind.IA3:
        # PEFT's (IA)³ has no layers_to_transform: a pattern says it all.
        targets = rf".*layers\.({'|'.join(map(str, layers))})\..*\.({'|'.join(modules)})"
    return AdapterSpec(
        kind=kind,
        rank=draw(st.integers(1, 5)),
        alpha=draw(st.sampled_from([1.0, 7.0])),
        use_rslora=draw(st.booleans()),
        dropout=draw(st.sampled_from([0.0, 0.3])) if kind is AdapterKind.LORA else 0.0,
        target_modules=targets,
        layers_to_transform=None if kind is AdapterKind.IA3 else tuple(layers),
        feedforward_modules=tuple(name for name in feedforward if name in modules),
        activation=draw(st.sampled_from(["relu", "gelu", "silu"])),
    )


@st.composite
def cuts(draw: st.DrawFn, num: int) -> list[int]:
    """Bounds of windows over `num` tokens, ends included."""
    inner = st.lists(st.integers(1, num - 1), unique=True, max_size=5) if num > 1 else st.just([])
    return [0, *sorted(draw(inner)), num]
