"""Readers of public request traces, told apart by their first line: Azure, BurstGPT, Mooncake."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np

from weft.base.errors import ConfigError
from weft.sim.workload import Workload

MOONCAKE_BLOCK_TOKENS = 512
"""Tokens that one hash id of a Mooncake trace stands for."""


class TraceFormat(StrEnum):
    """The trace files that can be read."""

    AZURE = "azure"
    """CSV: TIMESTAMP, ContextTokens, GeneratedTokens."""
    BURSTGPT = "burstgpt"
    """CSV: Timestamp (s), Model, Request tokens, Response tokens, Total tokens, Log Type."""
    MOONCAKE = "mooncake"
    """JSON lines: timestamp (ms), input_length, output_length, hash_ids (blocks of 512 tokens)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Row:
    time_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    block_ids: tuple[int, ...] = ()


def read_trace(path: str | Path, trace_format: TraceFormat | None = None) -> Workload:
    """Read a trace; arrivals are sorted and begin at 0.

    Rows that ask for or bring no token (requests that failed when traced) are left out and counted
    in `Workload.num_skipped`.

    Raises:
        ConfigError: the file cannot be read, is none of the formats, holds no request, or has a
            bad row; the message names the line.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"trace {path} cannot be read: {error}") from None
    if trace_format is None:
        trace_format = detect_format(lines[0] if lines else "", str(path))
    readers = {
        TraceFormat.AZURE: _azure_rows,
        TraceFormat.BURSTGPT: _burstgpt_rows,
        TraceFormat.MOONCAKE: _mooncake_rows,
    }
    rows = list(readers[trace_format](lines, str(path)))
    kept = [row for row in rows if row.num_output_tokens > 0 and row.num_prompt_tokens > 0]
    if not kept:
        raise ConfigError(f"trace {path} holds no request that brings and asks for tokens")
    kept.sort(key=lambda row: row.time_s)
    start_s = kept[0].time_s
    has_blocks = trace_format is TraceFormat.MOONCAKE
    return Workload(
        name=Path(path).name,
        arrival_s=np.array([row.time_s - start_s for row in kept]),
        num_prompt_tokens=np.array([row.num_prompt_tokens for row in kept], np.int64),
        num_output_tokens=np.array([row.num_output_tokens for row in kept], np.int64),
        block_ids=tuple(row.block_ids for row in kept) if has_blocks else None,
        block_tokens=MOONCAKE_BLOCK_TOKENS,
        num_skipped=len(rows) - len(kept),
    )


def detect_format(first_line: str, where: str = "trace") -> TraceFormat:
    """Tell the format by the header, or by the first line being a JSON object.

    Raises:
        ConfigError: it is none of them; the message lists what is looked for.
    """
    if first_line.lstrip().startswith("{"):
        return TraceFormat.MOONCAKE
    columns = {column.strip().lower() for column in first_line.split(",")}
    if {"timestamp", "contexttokens", "generatedtokens"} <= columns:
        return TraceFormat.AZURE
    if {"timestamp", "request tokens", "response tokens"} <= columns:
        return TraceFormat.BURSTGPT
    raise ConfigError(
        f"{where} starts with {first_line[:80]!r}, which is no known trace; known are Azure CSV "
        "(TIMESTAMP,ContextTokens,GeneratedTokens), BurstGPT CSV (Timestamp,Model,Request tokens,"
        "Response tokens,...) and Mooncake JSON lines (timestamp, input_length, output_length, "
        "hash_ids)"
    )


def _csv_rows(lines: list[str], where: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Each data row as (place, lower-case column -> text); blank lines are passed over."""
    header = [column.strip().lower() for column in _split(lines[0], where)] if lines else []
    for number, line in enumerate(lines[1:], start=2):
        if not line.strip():
            continue
        place = f"{where}, line {number}"
        cells = _split(line, place)
        if len(cells) != len(header):
            raise ConfigError(f"{place}: {len(cells)} columns where the header names {len(header)}")
        yield place, dict(zip(header, cells, strict=True))


def _split(line: str, place: str) -> list[str]:
    try:
        return next(csv.reader([line]))
    except (csv.Error, StopIteration) as error:
        raise ConfigError(f"{place}: not CSV: {error}") from None


def _azure_rows(lines: list[str], where: str) -> Iterator[_Row]:
    for place, cells in _csv_rows(lines, where):
        yield _Row(
            time_s=_instant_s(_cell(cells, "timestamp", place), place),
            num_prompt_tokens=_count(_cell(cells, "contexttokens", place), "ContextTokens", place),
            num_output_tokens=_count(
                _cell(cells, "generatedtokens", place), "GeneratedTokens", place
            ),
        )


def _burstgpt_rows(lines: list[str], where: str) -> Iterator[_Row]:
    for place, cells in _csv_rows(lines, where):
        yield _Row(
            time_s=_seconds(_cell(cells, "timestamp", place), place),
            num_prompt_tokens=_count(
                _cell(cells, "request tokens", place), "Request tokens", place
            ),
            num_output_tokens=_count(
                _cell(cells, "response tokens", place), "Response tokens", place
            ),
        )


def _mooncake_rows(lines: list[str], where: str) -> Iterator[_Row]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place = f"{where}, line {number}"
        try:
            data = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{place}: not JSON: {error}") from None
        if not isinstance(data, dict):
            raise ConfigError(f"{place}: {type(data).__name__} where an object is needed")
        block_ids = _cell(data, "hash_ids", place)
        if not isinstance(block_ids, list) or not all(
            type(block) is int and block >= 0 for block in block_ids
        ):
            raise ConfigError(f"{place}: hash_ids must be a list of whole numbers of 0 or more")
        yield _Row(
            time_s=_seconds(_cell(data, "timestamp", place), place) / 1e3,
            num_prompt_tokens=_count(_cell(data, "input_length", place), "input_length", place),
            num_output_tokens=_count(_cell(data, "output_length", place), "output_length", place),
            block_ids=tuple(block_ids),
        )


def _cell(data: dict[str, Any], key: str, place: str) -> Any:
    if key not in data:
        raise ConfigError(f"{place}: {key!r} is missing")
    return data[key]


def _count(value: Any, name: str, place: str) -> int:
    # Some exports write counts as 12.0.
    number = _number(value)
    if number is None or not number.is_integer() or number < 0:
        raise ConfigError(f"{place}: {name} is {value!r}; it must be a whole number of 0 or more")
    return int(number)


def _seconds(value: Any, place: str) -> float:
    seconds = _number(value)
    if seconds is None or not np.isfinite(seconds):
        raise ConfigError(f"{place}: timestamp is {value!r}; it must be a number")
    return seconds


def _number(value: Any) -> float | None:
    if isinstance(value, bool):
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _instant_s(text: str, place: str) -> float:
    """Seconds since 1970 of an ISO date and time, zone optional (UTC where it is left out)."""
    try:
        instant = datetime.fromisoformat(text.strip())
    except ValueError:
        raise ConfigError(
            f"{place}: TIMESTAMP is {text!r}; it must be a date and time such as "
            "2023-11-16 18:15:46.6805900"
        ) from None
    if instant.tzinfo is None:
        instant = instant.replace(tzinfo=UTC)
    return instant.timestamp()
