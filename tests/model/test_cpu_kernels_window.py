"""Native attention of a window of queries, forward and backward, against autograd in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.narrow_kernels import kernels
from weft.model.kernels import cpu_window
from weft.model.kernels.cpu_team import native_kernels
from weft.model.kernels.cpu_window import (
    can_run,
    token_multiple,
    window_backward,
    window_forward,
)
from weft.model.kernels.held_tokens import HeldTokens

pytestmark = pytest.mark.skipif(
    native_kernels() is None, reason="this processor or platform has no native CPU kernels"
)

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def forward(query: Tensor, seen: HeldTokens) -> Tensor:
    out = query.new_empty(query.shape[0], query.shape[1] * query.shape[2])
    window_forward(query, seen, out)
    return out


def held(keys: Tensor, values: Tensor, num_before: int, window: int | None) -> HeldTokens:
    """The tokens up to the last query's, from position 7 on; zeros behind, up to a multiple."""
    multiple = token_multiple(keys.dtype, keys.device, keys.shape[2])
    assert multiple is not None
    rest = -keys.shape[1] % multiple
    padded = [torch.nn.functional.pad(x, (0, 0, 0, rest)) for x in (keys, values)]
    return HeldTokens(
        keys=padded[0],
        values=padded[1],
        first=7,
        begin=7 + num_before,
        end=7 + keys.shape[1],
        window=window,
    )


def reference(
    query: Tensor, keys: Tensor, values: Tensor, num_before: int, window: int | None
) -> Tensor:
    """Plain attention of queries [s, Hq, D] that begin at position `num_before`."""
    group = query.shape[1] // keys.shape[0]
    keys, values = (x.repeat_interleave(group, 0) for x in (keys, values))
    scores = torch.einsum("shd,hcd->hsc", query, keys) * query.shape[2] ** -0.5
    positions = torch.arange(num_before, num_before + query.shape[0])[:, None]
    tokens = torch.arange(keys.shape[1])
    is_hidden = tokens > positions
    if window is not None:
        is_hidden |= tokens <= positions - window
    probs = torch.softmax(scores.masked_fill(is_hidden, float("-inf")), dim=-1)
    return torch.einsum("hsc,hcd->shd", probs, values).flatten(1)


def error(found: Tensor, wanted: Tensor | None) -> float:
    assert wanted is not None
    return float((found.double() - wanted).norm() / wanted.norm())


CASES = {
    "one-token": (1, 3, 2, 1, 64, None),
    "first-window": (37, 0, 2, 1, 64, None),
    "group": (50, 13, 2, 3, 64, None),
    "whole-blocks": (112, 64, 3, 1, 64, None),
    "sliding": (130, 41, 2, 2, 64, 23),
    "sliding-far": (20, 300, 1, 1, 64, 40),
    "narrow-head": (30, 5, 1, 2, 32, None),
}


@pytest.mark.parametrize(
    ("lanes", "has_dot"), [(16, True), (16, False), (8, False)], ids=["dot", "wide", "narrow"]
)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_windows_agree_with_autograd(
    case: str, dtype: torch.dtype, lanes: int, has_dot: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_rows, num_before, num_kv_heads, group, head_dim, window = CASES[case]
    native = kernels(lanes, has_dot)
    monkeypatch.setattr(cpu_window, "native_kernels", lambda: native)
    generator = torch.Generator().manual_seed(num_rows)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    num_tokens = num_before + num_rows
    query = draw(num_rows, num_kv_heads * group, head_dim)
    keys, values = (draw(num_kv_heads, num_tokens, head_dim) for _ in range(2))
    d_out = draw(num_rows, num_kv_heads * group * head_dim)
    exact = [x.double().requires_grad_() for x in (query, keys, values)]
    wanted = reference(exact[0], exact[1], exact[2], num_before, window)
    wanted.backward(d_out.double())
    seen = held(keys, values, num_before, window)
    assert can_run(query, seen)
    tolerance = TOLERANCE[dtype]
    assert error(forward(query, seen), wanted.detach()) <= tolerance
    # Accumulators are longer than what is seen, and what is in them stays.
    before = torch.randn(2, num_kv_heads, num_tokens + 9, head_dim, generator=generator)
    grads = before.clone()
    rows = slice(4, 4 + num_tokens)
    d_query = window_backward(d_out, query, seen, grads[0][:, rows], grads[1][:, rows])
    assert error(d_query, exact[0].grad) <= tolerance
    added = (grads - before)[:, :, rows]
    assert error(added[0], exact[1].grad) <= 2 * tolerance
    assert error(added[1], exact[2].grad) <= 2 * tolerance
    outside = torch.cat([(grads - before)[:, :, :4], (grads - before)[:, :, 4 + num_tokens :]], 2)
    assert not outside.any()


def test_windows_do_not_change_the_bits() -> None:
    """A query's output does not depend on the window that it comes in."""
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(90, 2, 64, generator=generator)
    keys, values = (torch.randn(2, 90, 64, generator=generator) for _ in range(2))
    whole = forward(query, held(keys, values, 0, None))
    part = forward(query[40:71], held(keys[:, :71], values[:, :71], 40, None))
    assert torch.equal(part, whole[40:71])


def test_threads_do_not_change_the_bits() -> None:
    """Each head is one thread's."""
    generator = torch.Generator().manual_seed(2)
    query = torch.randn(70, 6, 64, generator=generator)
    keys, values = (torch.randn(3, 70, 64, generator=generator) for _ in range(2))
    d_out = torch.randn(70, 6 * 64, generator=generator)
    seen = held(keys, values, 0, None)
    before = torch.get_num_threads()
    found: list[list[Tensor]] = []
    try:
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            assert can_run(query, seen)
            sums = torch.zeros(2, 3, 70, 64)
            d_query = window_backward(d_out, query, seen, sums[0], sums[1])
            found.append([forward(query, seen), d_query, sums])
        torch.set_num_threads(4)
        assert not can_run(query, seen)
    finally:
        torch.set_num_threads(before)
    for one, other in zip(found[0] * 2, found[1] + found[2], strict=True):
        assert torch.equal(one, other)
