"""Plain-data messages as msgpack: dataclasses, ints, strings and NumPy arrays, nothing live."""

from __future__ import annotations

from typing import Any, TypeVar, cast

import msgspec
import numpy as np
import numpy.typing as npt

T = TypeVar("T")


def _encode(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        array = np.ascontiguousarray(cast("npt.NDArray[Any]", value))
        return (array.dtype.str, array.shape, array.data if array.size else b"")
    if isinstance(value, np.generic):
        return cast("np.generic", value).item()
    raise TypeError(f"{type(value).__name__} may not cross a process border")


def _decode(kind: type, value: Any) -> Any:
    # np.ndarray[...] aliases arrive as their origin; anything else here is a bug.
    if getattr(kind, "__origin__", kind) is np.ndarray:
        dtype, shape, data = value
        return np.frombuffer(data, dtype=dtype).reshape(shape).copy()
    raise TypeError(f"{kind} may not cross a process border")


_encoder = msgspec.msgpack.Encoder(enc_hook=_encode)
_decoders: dict[type, msgspec.msgpack.Decoder[Any]] = {}


def encode(message: Any) -> bytes:
    """Pack a dataclass (or msgspec struct) of plain data."""
    return _encoder.encode(message)


def decode(data: bytes | memoryview, kind: type[T]) -> T:
    """Unpack what `encode` packed; arrays come back writable, with dtype and shape."""
    decoder = _decoders.get(kind)
    if decoder is None:
        decoder = _decoders[kind] = msgspec.msgpack.Decoder(kind, dec_hook=_decode)
    return decoder.decode(data)
