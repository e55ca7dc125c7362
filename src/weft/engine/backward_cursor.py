"""How far the backward pass of one sample has come, and which rows come next.

A row passes the layers [first_layer, end_layer) from the top down for the tokens [begin, end).
Legal orders keep two rules: within a layer, windows run right to left, since a window's key and
value gradients are final only once all tokens to its right are done; and a layer runs on a span
only when the layer above is done there. (FlexLLM, arXiv 2402.18789 §6.1.)
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from weft.engine.finetune import BackwardOrder


@dataclass(frozen=True, kw_only=True, slots=True)
class BackwardSpan:
    """One backward row's tokens and layers."""

    begin: int
    end: int
    first_layer: int
    end_layer: int

    @property
    def num_token_layers(self) -> int:
        """Tokens times layers: the row's work."""
        return (self.end - self.begin) * (self.end_layer - self.first_layer)


@dataclass(frozen=True, kw_only=True, slots=True)
class BackwardCursor:
    """What is left of a sample's backward pass; immutable, so that a policy may try and discard."""

    order: BackwardOrder
    num_tokens: int
    lowest_layer: int
    """Of the layers with a bypass: below it no gradient is wanted."""
    max_window: int
    """Most tokens of one row."""
    layer: int
    """The layer in work: those above are done (for the open window, in window-major order)."""
    top_layer: int
    """The model's last layer, where windows start."""
    end: int
    """Tokens from here on are done in `layer`; for window-major: right end of the open window."""
    begin: int
    """Window-major: left end of the open window; equal to `end` while none is open. Else unused."""

    @classmethod
    def at_top(
        cls,
        *,
        order: BackwardOrder,
        num_tokens: int,
        lowest_layer: int,
        num_layers: int,
        max_window: int,
    ) -> BackwardCursor:
        """Nothing done yet."""
        return cls(
            order=order,
            num_tokens=num_tokens,
            lowest_layer=lowest_layer,
            max_window=max_window,
            layer=num_layers - 1,
            top_layer=num_layers - 1,
            end=num_tokens,
            begin=num_tokens,
        )

    @property
    def is_done(self) -> bool:
        """Whether no row is left."""
        if self.order is BackwardOrder.LAYER_MAJOR:
            return self.layer < self.lowest_layer
        return self.end == 0

    @property
    def num_left(self) -> int:
        """Token-layers that are left."""
        layers = self.layer - self.lowest_layer + 1
        if self.order is BackwardOrder.LAYER_MAJOR:
            return max(0, layers * self.num_tokens - (self.num_tokens - self.end))
        all_layers = self.top_layer - self.lowest_layer + 1
        return self.begin * all_layers + (self.end - self.begin) * layers

    def take(
        self, most: int, *, granule: int = 1
    ) -> tuple[tuple[BackwardSpan, ...], BackwardCursor]:
        """Rows of at most `most` token-layers together, and the cursor behind them.

        A window that does not reach the left end holds a multiple of `granule` tokens, or
        `max_window` where that is less.
        """
        if self.order is BackwardOrder.LAYER_MAJOR:
            return self._take_layers(most, granule)
        return self._take_windows(most, granule)

    def _take_layers(
        self, most: int, granule: int
    ) -> tuple[tuple[BackwardSpan, ...], BackwardCursor]:
        spans: list[BackwardSpan] = []
        layer, end = self.layer, self.end
        while layer >= self.lowest_layer:
            is_whole = end == self.num_tokens and end <= self.max_window
            depth = min(most // end, layer - self.lowest_layer + 1) if is_whole else 0
            if depth:
                begin, first = 0, layer - depth + 1
            else:
                size = _window(min(end, self.max_window), end, most, granule)
                if size == 0:
                    break
                begin, first = end - size, layer
            span = BackwardSpan(begin=begin, end=end, first_layer=first, end_layer=layer + 1)
            spans.append(span)
            most -= span.num_token_layers
            end = begin
            if end == 0:
                layer, end = first - 1, self.num_tokens
        return tuple(spans), replace(self, layer=layer, end=end, begin=end)

    def _take_windows(
        self, most: int, granule: int
    ) -> tuple[tuple[BackwardSpan, ...], BackwardCursor]:
        spans: list[BackwardSpan] = []
        all_layers = self.top_layer - self.lowest_layer + 1
        layer, end, begin = self.layer, self.end, self.begin
        while end > 0:
            if begin == end:
                # As many tokens as pass all layers now; else as few as are worth a row.
                widest = min(end, self.max_window)
                wanted = max(most // all_layers, min(granule, widest))
                # A row's most tokens may be fewer than a granule.
                size = _window(widest, end, wanted, min(granule, widest))
                begin = end - size
            depth = min(most // (end - begin), layer - self.lowest_layer + 1)
            if depth == 0:
                break
            first = layer - depth + 1
            span = BackwardSpan(begin=begin, end=end, first_layer=first, end_layer=layer + 1)
            spans.append(span)
            most -= span.num_token_layers
            layer = first - 1
            if layer < self.lowest_layer:
                layer, end = self.top_layer, begin
        if not spans:
            return (), self  # A window that was not begun may be another size next time.
        return tuple(spans), replace(self, layer=layer, end=end, begin=begin)


def _window(widest: int, left: int, most: int, granule: int) -> int:
    """Tokens of the next window: at most `widest` and `most`, whole granules unless it ends."""
    size = min(widest, most)
    if size < left:
        size -= size % granule
        if size == 0 and widest < granule <= most:
            return widest
    return size
