"""Products of many rows as lists of native calls, and how large their blocks are.

Shape legend: M rows, U units of the contraction, N outputs.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

from torch import Tensor

from weft.model.kernels.cpu_gemm import Epilogue
from weft.model.kernels.cpu_ir import Isa, Storage
from weft.model.kernels.cpu_panel_ir import (
    CHUNK,
    PACK_ARGS,
    PANEL_ARGS,
    PackSpec,
    PanelSpec,
    panel_width,
)
from weft.model.kernels.cpu_team import Call, NativeKernels

# Rows by units that stay in the second-level cache, four bytes each, beside a panel.
_BLOCK = 256 * 768
_MAX_BLOCK_ROWS = 512
_PACK_ROWS_WORD = PACK_ARGS.index("m")
_PANEL_ROWS_WORD = PANEL_ARGS.index("m")


@functools.lru_cache(maxsize=1024)
def _panel_spec(
    storage: Storage, epilogue: Epilogue, isa: Isa, size: int, is_grad: bool
) -> PanelSpec:
    can_dot = storage is Storage.BFLOAT16 and isa.has_bf16_dot
    use_dot = can_dot and size % (2 * CHUNK) == 0
    return PanelSpec(storage=storage, epilogue=epilogue, use_dot=use_dot, is_grad=is_grad)


def panel_spec(
    native: NativeKernels, storage: Storage, epilogue: Epilogue, size: int, *, is_grad: bool
) -> PanelSpec:
    """The variant for a contraction of `size` elements, a multiple of `CHUNK`."""
    return _panel_spec(storage, epilogue, native.isa, size, is_grad)


def sum_spec(native: NativeKernels, storage: Storage) -> PanelSpec:
    """The variant for a sum over tokens; their number is a multiple of `sum_multiple`."""
    use_dot = storage is Storage.BFLOAT16 and native.isa.has_bf16_dot
    return PanelSpec(
        storage=storage, epilogue=Epilogue.NONE, use_dot=use_dot, is_grad=True, is_sum=True
    )


def sum_multiple(spec: PanelSpec) -> int:
    """Tokens that the kernel of a sum takes at once."""
    return CHUNK * spec.unit_size


def even_cuts(total: int, most: int, step: int = 1) -> list[tuple[int, int]]:
    """Cut `total` into as few (begin, end) of at most `most` as can be, even to `step`s."""
    count = -(-total // most)
    bounds = [total // step * i // count * step for i in range(count + 1)]
    return list(pairwise(bounds))


@dataclass(frozen=True, kw_only=True)
class _Product:
    """Operands and scratch of one product."""

    spec: PanelSpec
    x: Tensor
    weight: Tensor
    y: Tensor
    extra: Tensor | None
    packed: Tensor
    panels: Tensor
    sums: Tensor
    num_slots: int

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """All that must live as long as the calls."""
        return (self.x, self.weight, self.y, self.extra, self.packed, self.panels, self.sums)

    def pack_words(self, rows: tuple[int, int], units: tuple[int, int]) -> tuple[int, ...]:
        """`PACK_ARGS` for one block."""
        skipped = rows[0] * self.x.stride(0) + units[0] * self.spec.unit_size
        return (
            _address(self.x, skipped),
            self.x.stride(0),
            self.packed.data_ptr(),
            rows[1] - rows[0],
            units[1] - units[0],
        )

    def panel_words(
        self, rows: tuple[int, int], units: tuple[int, int], num_units: int
    ) -> tuple[int, ...]:
        """`PANEL_ARGS` for one block of a contraction of `num_units`."""
        ldw, ldy = self.weight.stride(0), self.y.stride(0)
        skipped = units[0] * self.spec.unit_size * (ldw if self.spec.is_grad else 1)
        added = rows[0] * ldy if self.spec.epilogue is Epilogue.ADD else 0
        return (
            self.packed.data_ptr(),
            _address(self.weight, skipped),
            ldw,
            _address(self.y, rows[0] * ldy),
            ldy,
            0 if self.extra is None else _address(self.extra, added),
            rows[1] - rows[0],
            self.y.shape[1],
            units[1] - units[0],
            self.sums.data_ptr(),
            int(units[0] == 0),
            int(units[1] == num_units),
            self.panels.data_ptr(),
            self.num_slots,
        )


def panel_calls(
    native: NativeKernels,
    spec: PanelSpec,
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    extra: Tensor | None = None,
    only_for: range | None = None,
) -> list[Call]:
    """The calls that fill y [M, N] from x [M, contraction], the weight and `extra`.

    weight [N, K] is contiguous; y is x Wᵀ, or x W for a gradient; `extra` is the bias [N] or the
    addend [M, N] with y's row stride. They run in order, each after the one before has ended.
    M is at least `MIN_PANEL_ROWS` (`MIN_GRAD_ROWS` for a gradient), but for sums over tokens, and y
    no narrower than a panel.
    """
    team = native.team
    # Replays of fewer rows must not leave a block with less than a product's fewest rows.
    most_rows = x.shape[0] if team.is_recording else _MAX_BLOCK_ROWS
    cuts = _cut(
        spec,
        native.isa,
        (x.shape[0], x.shape[1] // spec.unit_size, y.shape[1]),
        (most_rows, _BLOCK),
    )
    num_slots = team.num_threads
    product = _Product(
        spec=spec,
        x=x,
        weight=weight,
        y=y,
        extra=extra,
        packed=team.scratch("packed rows", cuts.num_packed),
        panels=team.scratch("panels", num_slots * cuts.num_panel),
        sums=team.scratch("sums", cuts.num_sums),
        num_slots=num_slots,
    )
    pack, kernel = native.address(cuts.pack), native.address(spec)
    call = partial(Call, keep=product.tensors, only_for=only_for)
    calls: list[Call] = []
    for rows, units in cuts.blocks:
        words = product.pack_words(rows, units)
        calls.append(call(kernel=pack, words=words, rows_word=_PACK_ROWS_WORD))
        words = product.panel_words(rows, units, cuts.num_units)
        calls.append(call(kernel=kernel, words=words, rows_word=_PANEL_ROWS_WORD))
    return calls


@dataclass(frozen=True, kw_only=True, slots=True)
class _Cuts:
    """How a product of one shape is cut, and what room that takes, in float32."""

    pack: PackSpec
    blocks: tuple[tuple[tuple[int, int], tuple[int, int]], ...]
    """(rows, units), each as (begin, end), in the order of the calls."""
    num_units: int
    num_packed: int
    num_panel: int
    num_sums: int


@functools.lru_cache(maxsize=1024)
def _cut(spec: PanelSpec, isa: Isa, shape: tuple[int, int, int], limits: tuple[int, int]) -> _Cuts:
    """Cut a product of `shape` (M, U, N) by `limits`: rows of a block, rows by units of one."""
    num_rows, num_units, num_outputs = shape
    width = panel_width(isa)
    row_blocks = even_cuts(num_rows, limits[0])
    most_rows = max(stop - start for start, stop in row_blocks)
    unit_blocks = even_cuts(num_units, max(CHUNK, limits[1] // max(most_rows, 256)), CHUNK)
    most_units = max(end - begin for begin, end in unit_blocks)
    num_panels = -(-num_outputs // spec.outputs_per_panel(isa))
    return _Cuts(
        pack=PackSpec(storage=spec.storage, use_dot=spec.use_dot),
        blocks=tuple((rows, units) for rows in row_blocks for units in unit_blocks),
        num_units=num_units,
        num_packed=most_rows * most_units,
        num_panel=most_units * width,
        num_sums=num_panels * most_rows * width if len(unit_blocks) > 1 else 0,
    )


def _address(tensor: Tensor, num_elements: int) -> int:
    return tensor.data_ptr() + num_elements * tensor.element_size()
