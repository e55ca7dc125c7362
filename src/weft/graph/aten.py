"""What one aten operator costs and keeps: FLOP, and the tensors saved for its backward.

Shapes in, numbers out; no torch. The saved-for-backward rule follows torch's derivative formulas
(`derivatives.yaml`): a matrix product keeps each operand whose partner needs a gradient; functions
whose derivative is written in terms of their result (ReLU, sigmoid, softmax, ...) keep the result;
those written in terms of their argument (GELU, SiLU, norms, ...) keep the argument; sums, copies
and reshapes keep nothing; dropout keeps one byte per element; fused attention keeps q, k, v, its
output and one float32 per row; an unlisted operator keeps its floating inputs and its output. The
two statistics per row that norms keep are left out.
FLOP: a multiply-add is 2; backward of a product is one product per operand that needs a gradient;
attention is counted dense (a causal mask does not halve it), backward twice forward, as in the
formulas of Megatron-LM (arXiv 2104.04473, appendix); anything else is 1 per element moved.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Operand:
    """A tensor that an operator reads or writes, at the example batch."""

    shape: tuple[int, ...]
    itemsize: int
    floating: bool
    needs_grad: bool = False

    @property
    def num_elements(self) -> int:
        """Product of the shape."""
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> int:
        """Elements times bytes each."""
        return self.num_elements * self.itemsize


@dataclass(frozen=True, kw_only=True, slots=True)
class AtenCost:
    """Figures of one call at the example batch; `saved_inputs` are positions among its operands."""

    flops_forward: float
    flops_backward: float
    saved_inputs: tuple[int, ...] = ()
    saves_output: bool = False
    extra_saved_bytes: int = 0
    gathers: bool = False
    is_product: bool = False


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


VIEWS = _names("""
    view reshape _unsafe_view expand expand_as transpose t permute squeeze unsqueeze slice select
    narrow flatten unflatten view_as alias detach contiguous movedim swapaxes chunk split
    split_with_sizes unbind tensor_split diagonal unfold lift_fresh_copy lift_fresh to type_as
    numpy_T mT squeeze_ unsqueeze_ transpose_ detach_ swapdims moveaxis real view_as_real
    view_as_complex
    """)
"""Operators that may return their first operand's storage; the caller decides where they copy."""

SHAPE_ONLY = _names("""
    empty_like zeros_like ones_like full_like rand_like randn_like randint_like new_empty new_zeros
    new_ones new_full bernoulli
    """)
"""Operators that read the shape of their operand and not its values."""

_SAVE_OUTPUT = _names("""
    relu sigmoid tanh exp sqrt rsqrt softmax _softmax log_softmax _log_softmax elu selu celu
    hardsigmoid reciprocal tan expm1 clamp_min threshold
    """)
_SAVE_INPUT = _names("""
    gelu silu mish softplus leaky_relu hardswish hardtanh relu6 logsigmoid pow sin cos log log1p
    log2 abs square layer_norm native_layer_norm group_norm batch_norm instance_norm rms_norm
    _fused_rms_norm var var_mean std clamp clip cumprod prod prelu glu erf sigmoid_focal
    max_pool1d max_pool2d max_pool3d norm linalg_vector_norm logsumexp amax amin max min
    _native_batch_norm_legit cosine_similarity normalize
    """)
_SAVE_NOTHING = (
    _names("""
    add sub rsub neg sum mean cat concat concatenate stack hstack vstack clone copy pad
    constant_pad_nd cumsum repeat repeat_interleave roll flip tile triu tril avg_pool1d avg_pool2d
    avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d upsample_nearest1d upsample_nearest2d
    upsample_bilinear2d upsample_bicubic2d pixel_shuffle pixel_unshuffle zero fill index_select
    index gather take_along_dim index_put masked_fill where masked_scatter masked_select scatter
    scatter_add index_add im2col col2im _to_copy __rsub__ floor ceil round sign
    channel_shuffle
    """)
    | VIEWS
)
_PAIRWISE_LOSS = _names("""
    mse_loss l1_loss smooth_l1_loss huber_loss binary_cross_entropy kl_div
    binary_cross_entropy_with_logits soft_margin_loss cosine_embedding_loss
    """)
_PRODUCTS = _names("linear matmul mm bmm mv dot vdot inner outer addmm baddbmm addbmm")
_CONVOLUTIONS = _names(
    "conv1d conv2d conv3d convolution conv_transpose1d conv_transpose2d conv_transpose3d"
)
_RECURRENT = _names("lstm gru rnn_tanh rnn_relu")


def aten_cost(
    name: str, operands: Sequence[Operand], output: Operand, *, equation: str = ""
) -> AtenCost:
    """Cost of the aten operator `name`, in-place operators by the name of their functional twin.

    `operands` are its tensor arguments in order; `equation` is einsum's.
    """
    if name in _PRODUCTS:
        return _product(name, operands, output)
    if name in _CONVOLUTIONS:
        return _convolution(name, operands, output)
    if name == "einsum":
        return _einsum(operands, output, equation)
    if name.startswith("scaled_dot_product") or name.endswith("_attention"):
        return _attention(operands, output)
    if name in _RECURRENT:
        return _recurrent(operands, output)
    if name in ("embedding", "embedding_bag", "_embedding_bag"):
        return _embedding(operands, output)
    return _elementwise(name, operands, output)


def _backward(flops: float, operands: Sequence[Operand]) -> float:
    return flops if any(o.needs_grad for o in operands) else 0.0


def _product_cost(
    flops: float, left: int, right: int, operands: Sequence[Operand], extra: float = 0.0
) -> AtenCost:
    a, b = operands[left], operands[right]
    saved = [left] * b.needs_grad + [right] * a.needs_grad
    return AtenCost(
        flops_forward=flops + extra,
        flops_backward=flops * (a.needs_grad + b.needs_grad),
        saved_inputs=tuple(saved),
        is_product=True,
    )


def _product(name: str, operands: Sequence[Operand], output: Operand) -> AtenCost:
    left = 1 if name in ("addmm", "baddbmm", "addbmm") else 0
    inner = operands[left].shape[-1] if operands[left].shape else 1
    bias = output.num_elements if len(operands) > 2 else 0
    if name in ("outer",):
        inner = 1
    return _product_cost(2.0 * output.num_elements * inner, left, left + 1, operands, bias)


def _convolution(name: str, operands: Sequence[Operand], output: Operand) -> AtenCost:
    source, weight = operands[0], operands[1]
    # Each output element of a convolution (input element of a transposed one) meets every weight
    # of one filter; groups are already out of the weight's second axis.
    per_site = weight.num_elements / max(weight.shape[0], 1)
    sites = source.num_elements if "transpose" in name else output.num_elements
    bias = output.num_elements if len(operands) > 2 else 0
    return _product_cost(2.0 * sites * per_site, 0, 1, operands, bias)


def _einsum(operands: Sequence[Operand], output: Operand, equation: str) -> AtenCost:
    sizes: dict[str, int] = {}
    terms = equation.replace(" ", "").split("->")[0].split(",")
    for term, operand in zip(terms, operands, strict=False):
        if "." not in term:
            sizes.update(zip(term, operand.shape, strict=False))
    flops = 2.0 * math.prod(sizes.values()) if sizes else 2.0 * output.num_elements
    if len(operands) == 2:
        return _product_cost(flops, 0, 1, operands)
    return AtenCost(
        flops_forward=flops,
        flops_backward=flops * sum(o.needs_grad for o in operands),
        saved_inputs=tuple(range(len(operands))),
        is_product=True,
    )


def _attention(operands: Sequence[Operand], output: Operand) -> AtenCost:
    query, key, value = operands[:3]
    rows = math.prod(query.shape[:-1])
    flops = 2.0 * rows * key.shape[-2] * (query.shape[-1] + value.shape[-1])
    needs = any(o.needs_grad for o in operands[:3])
    return AtenCost(
        flops_forward=flops,
        flops_backward=2 * flops if needs else 0.0,
        saved_inputs=(0, 1, 2) if needs else (),
        saves_output=needs,
        extra_saved_bytes=4 * rows if needs else 0,
        is_product=True,
    )


def _recurrent(operands: Sequence[Operand], output: Operand) -> AtenCost:
    steps = math.prod(operands[0].shape[:-1])
    weights = sum(o.num_elements for o in operands[1:] if len(o.shape) == 2)
    flops = 2.0 * steps * weights
    needs = any(o.needs_grad for o in operands)
    return AtenCost(
        flops_forward=flops,
        flops_backward=2 * flops if needs else 0.0,
        saved_inputs=(0,) if needs else (),
        saves_output=needs,
        # Gate activations: as many values as the first weight has rows, per step.
        extra_saved_bytes=steps * operands[-1].shape[0] * output.itemsize if needs else 0,
        is_product=True,
    )


def _embedding(operands: Sequence[Operand], output: Operand) -> AtenCost:
    table, indices = operands[0], operands[1]
    moved = float(indices.num_elements * (table.shape[-1] if table.shape else 1))
    needs = table.needs_grad
    return AtenCost(
        flops_forward=moved,
        flops_backward=moved if needs else 0.0,
        saved_inputs=(1,) if needs else (),
        gathers=True,
    )


def _elementwise(name: str, operands: Sequence[Operand], output: Operand) -> AtenCost:
    flops = float(max([output.num_elements, *(o.num_elements for o in operands)]))
    backward = _backward(flops, operands)
    if name in _SAVE_NOTHING or not backward:
        # Index tensors and masks of gathers and selections are integers: kept, and counted.
        indices = tuple(i for i, o in enumerate(operands) if not o.floating) if backward else ()
        return AtenCost(flops_forward=flops, flops_backward=backward, saved_inputs=indices)
    if name in ("mul", "multiply", "div", "divide", "true_divide", "atan2"):
        return _pointwise_product(name, flops, operands, backward)
    if name in ("dropout", "native_dropout", "feature_dropout"):
        return AtenCost(
            flops_forward=flops, flops_backward=backward, extra_saved_bytes=output.num_elements
        )
    if name in ("cross_entropy_loss", "nll_loss", "nll_loss_nd"):
        extra = operands[0].size_bytes if name == "cross_entropy_loss" else 0
        return AtenCost(
            flops_forward=flops,
            flops_backward=backward,
            saved_inputs=(1,),
            extra_saved_bytes=extra,
        )
    if name in _PAIRWISE_LOSS:
        return AtenCost(
            flops_forward=flops,
            flops_backward=backward,
            saved_inputs=tuple(range(min(2, len(operands)))),
        )
    if name in _SAVE_OUTPUT:
        return AtenCost(flops_forward=flops, flops_backward=backward, saves_output=True)
    if name in _SAVE_INPUT:
        return AtenCost(flops_forward=flops, flops_backward=backward, saved_inputs=(0,))
    floating = tuple(i for i, o in enumerate(operands) if o.floating)
    return AtenCost(
        flops_forward=flops, flops_backward=backward, saved_inputs=floating, saves_output=True
    )


def _pointwise_product(
    name: str, flops: float, operands: Sequence[Operand], backward: float
) -> AtenCost:
    saved: list[int] = []
    if len(operands) == 2:
        a, b = operands
        division = name in ("div", "divide", "true_divide")
        if b.needs_grad:
            saved.append(0)
        if a.needs_grad or (division and b.needs_grad):
            saved.append(1)
    return AtenCost(flops_forward=flops, flops_backward=backward, saved_inputs=tuple(saved))
