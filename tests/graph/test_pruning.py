"""Pruning against definitions that share no code with it: paths, and subsets by force."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from weft.base.errors import GraphError
from weft.graph.adapter_spec import (
    AdapterKind,
    AdapterSpec,
    BypassTarget,
    LayerWidths,
    Module,
    resolve_targets,
)
from weft.graph.layer_graph import LayerGraph, LayerOptions, build_layer_graph
from weft.graph.pruning import BackwardNeeds, Encoding, Remat, backward_needs

WIDTHS = LayerWidths(hidden=64, query=96, kv=32, ffn=160)


def layer(targets: list[BypassTarget], *, qk_norm: bool = False, gated: bool = True) -> LayerGraph:
    return build_layer_graph(LayerOptions(widths=WIDTHS, qk_norm=qk_norm, gated=gated), targets)


def targets_of(
    kind: AdapterKind, modules: tuple[str, ...], rank: int = 4
) -> tuple[BypassTarget, ...]:
    spec = AdapterSpec(kind=kind, rank=rank, target_modules=modules)
    return resolve_targets(spec, num_layers=1, widths=WIDTHS)


@st.composite
def layers(draw: st.DrawFn, most: int = 9) -> LayerGraph:
    """A layer of any family with up to `most` bypasses of any kinds."""
    gated = draw(st.booleans())
    linears = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
    linears += ["gate_proj"] if gated else []
    modules = st.lists(st.sampled_from([*linears, "self_attn", "mlp"]), unique=True, max_size=most)
    targets: list[BypassTarget] = []
    for module in draw(modules):
        kind = AdapterKind.BOTTLENECK
        if module in linears:
            kind = draw(st.sampled_from([AdapterKind.LORA, AdapterKind.IA3]))
        targets.extend(targets_of(kind, (module,)))
    return layer(targets, qk_norm=draw(st.booleans()), gated=gated)


def leads_to_training(graph: LayerGraph, tensor: str, *, to_input: bool) -> bool:
    """Whether a path of operators runs from `tensor` back to a trained weight or the input."""
    if tensor == "layer_input":
        return to_input
    (op,) = [op for op in graph.ops if op.output == tensor]
    if op.weight_grads:
        return True
    return any(leads_to_training(graph, name, to_input=to_input) for name in op.inputs)


def reads_by_definition(graph: LayerGraph, *, to_input: bool) -> tuple[set[str], set[str]]:
    values: set[str] = set()
    signs: set[str] = set()
    for op in graph.ops:
        for read in op.weight_grads.values():
            values.update(read.values)
        for name, read in op.input_grads.items():
            if leads_to_training(graph, name, to_input=to_input):
                values.update(read.values)
                signs.update(read.signs)
    return values, signs - values


def closure(graph: LayerGraph, start: set[str], *, cheap_only: bool) -> set[str]:
    found = start | graph.in_pages
    for op in graph.ops:
        if set(op.inputs) <= found and (op.is_cheap or not cheap_only):
            found.add(op.output)
    return found


@settings(max_examples=150, deadline=None)
@given(layers(), st.booleans())
def test_the_pruned_reverse_graph_reads_what_paths_to_trained_weights_read(
    graph: LayerGraph, to_input: bool
) -> None:
    needs = backward_needs(graph, needs_input_grad=to_input, remat=Remat.NONE)
    values, signs = reads_by_definition(graph, to_input=to_input)
    expected = dict.fromkeys(values - graph.in_pages, Encoding.FULL)
    expected |= dict.fromkeys(signs, Encoding.SIGN_BITS)
    assert dict(needs.saved) == expected
    assert needs.reads_pages == bool(values & graph.in_pages)
    assert needs.recomputed == ()
    assert needs.is_empty == (not graph.trainable and not to_input)


@settings(max_examples=60, deadline=None)
@given(layers(most=2), st.booleans())
def test_rematerialization_keeps_the_least_that_cheap_operators_can_start_from(
    graph: LayerGraph, to_input: bool
) -> None:
    needs = backward_needs(graph, needs_input_grad=to_input, remat=Remat.PRUNED)
    values, signs = reads_by_definition(graph, to_input=to_input)
    wanted = sorted(values - graph.in_pages)
    assume(len(wanted) <= 10)  # 1,024 subsets
    kept = {name for name, encoding in needs.saved.items() if encoding is Encoding.FULL}
    assert set(needs.saved) - kept == signs
    assert values <= closure(graph, kept, cheap_only=True)
    least = min(
        sum(graph.widths[name] for name in subset)
        for size in range(len(wanted) + 1)
        for subset in combinations(wanted, size)
        if values <= closure(graph, set(subset), cheap_only=True)
    )
    assert sum(graph.widths[name] for name in kept) == least


@settings(max_examples=100, deadline=None)
@given(layers(), st.booleans(), st.sampled_from(Remat))
def test_what_is_recomputed_can_be_in_that_order(
    graph: LayerGraph, to_input: bool, remat: Remat
) -> None:
    needs = backward_needs(graph, needs_input_grad=to_input, remat=remat)
    have = set(needs.saved) | graph.in_pages
    producers = {op.output: op for op in graph.ops}
    for name in needs.recomputed:
        assert set(producers[name].inputs) <= have, name
        have.add(name)
    values, _ = reads_by_definition(graph, to_input=to_input)
    assert values <= have
    if remat is Remat.LAYER_INPUT and (values - graph.in_pages):
        assert set(needs.saved) == {"layer_input"}


def widths_saved(needs: BackwardNeeds) -> set[str]:
    return set(needs.saved)


def test_the_sheets_case_lora_on_down_proj() -> None:
    """FlexLLM sheet §2.2: 2h + Hd + 2f a token for a layer within the stack."""
    graph = layer(list(targets_of(AdapterKind.LORA, ("down_proj",))))
    needs = backward_needs(graph, needs_input_grad=True, remat=Remat.PRUNED)
    assert widths_saved(needs) == {"layer_input", "query", "mlp_input", "gate", "up"}
    bits = needs.saved_bits_per_token(graph.widths, 16)
    assert bits == 16 * (2 * WIDTHS.hidden + WIDTHS.query + 2 * WIDTHS.ffn)
    assert needs.recomputed == ("act", "low_rank:down_proj")


def test_the_lowest_trained_layer_stops_at_its_lowest_bypass() -> None:
    graph = layer(list(targets_of(AdapterKind.LORA, ("down_proj",))))
    needs = backward_needs(graph, needs_input_grad=False, remat=Remat.PRUNED)
    assert widths_saved(needs) == {"act"}
    assert not needs.reads_pages
    assert needs.gradients == {"mlp_sub", "layer_output", "low_rank:down_proj"}


def test_relu_keeps_one_bit_an_element() -> None:
    graph = layer(list(targets_of(AdapterKind.LORA, ("q_proj",))), gated=False)
    needs = backward_needs(graph, needs_input_grad=False, remat=Remat.PRUNED)
    assert needs.saved["act"] is Encoding.SIGN_BITS
    others = sum(graph.widths[name] for name in needs.saved if name != "act")
    assert needs.saved_bits_per_token(graph.widths, 16) == 16 * others + WIDTHS.ffn


def test_two_bypasses_on_one_module_are_refused() -> None:
    (target,) = targets_of(AdapterKind.LORA, ("q_proj",))
    with pytest.raises(GraphError, match="two bypasses"):
        layer([target, target])


def test_modules_are_named_as_in_checkpoints() -> None:
    spec = AdapterSpec(target_modules=r".*\.(q_proj|down_proj)")
    found = resolve_targets(spec, num_layers=2, widths=WIDTHS)
    assert [(t.layer, t.module) for t in found] == [
        (0, Module.Q_PROJ),
        (0, Module.DOWN_PROJ),
        (1, Module.Q_PROJ),
        (1, Module.DOWN_PROJ),
    ]
