"""From a directory to an executor: what "auto" becomes, and what is refused at the start."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from model.test_tokenizer import byte_level_backend
from model.tiny_models import CONFIGS, write_checkpoint
from weft.base.clock import WallClock
from weft.base.errors import ConfigError, ModelLoadError, OutOfMemoryError, UnsupportedError
from weft.engine.config import PolicyConfig
from weft.engine.continuous import ContinuousBatching
from weft.model.config import ModelConfig
from weft.runtime import build
from weft.runtime.build import ExecutorConfig, build_executor, resolve_dtype
from weft.runtime.kv_layout import kv_layout


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    write_checkpoint("qwen2-mixed-windows", path)
    byte_level_backend().save(str(path / "tokenizer.json"))
    return path


def test_auto_is_resolved_once(directory: Path) -> None:
    built = build_executor(ExecutorConfig(model=str(directory)))
    resolved = built.resolved
    assert resolved.dtype is torch.float64, "the checkpoint's"
    assert resolved.device == torch.device("cuda" if torch.cuda.is_available() else "cpu")
    assert resolved.max_model_len == 128
    assert resolved.max_num_seqs == built.executor.info.max_num_seqs
    assert built.generation.eos_token_ids == (2,)
    assert built.context.arena.numel() == resolved.kv_cache_memory_bytes
    assert built.context.size_bytes >= 8 * built.config.num_parameters
    built.executor.close()


def test_settings_are_taken(directory: Path) -> None:
    built = build_executor(
        ExecutorConfig(
            model=str(directory),
            dtype="bfloat16",
            device="cpu",
            max_model_len=64,
            max_num_seqs=3,
            max_num_batched_tokens=32,
            kv_cache_memory_bytes=1 << 20,
        )
    )
    assert built.resolved.dtype is torch.bfloat16
    assert built.executor.info.max_num_seqs == 3
    assert built.executor.info.num_pages == (1 << 20) // built.executor.info.page_bytes


def test_an_arena_that_is_not_given_says_how_large_it_was(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "most_memory_bytes", lambda device: 1 << 62)
    # More than an address space holds, so that no overcommitting kernel gives it.
    config = ExecutorConfig(model=str(directory), device="cpu", kv_cache_memory_bytes=1 << 58)
    with pytest.raises(OutOfMemoryError, match=r"cpu does not give 288\d{15} bytes"):
        build_executor(config)


@pytest.mark.parametrize(
    ("given", "name"),
    [("half", "float16"), ("float", "float32"), (torch.bfloat16, "bfloat16"), ("auto", "auto")],
)
def test_a_dtype_has_several_names(given: Any, name: str) -> None:
    assert ExecutorConfig(model="m", dtype=given).dtype == name


def test_a_cache_too_small_for_one_sequence_names_the_bytes_that_do(directory: Path) -> None:
    config = ExecutorConfig(model=str(directory), device="cpu", kv_cache_memory_bytes=5000)
    with pytest.raises(OutOfMemoryError, match="kv_cache_memory_bytes is 5000") as caught:
        build_executor(config)
    found = re.search(r"(\d+) bytes \(", str(caught.value))
    assert found is not None
    enough = int(found.group(1))
    built = build_executor(
        ExecutorConfig(model=str(directory), device="cpu", kv_cache_memory_bytes=enough)
    )
    # The policy, which checks again, agrees.
    ContinuousBatching(
        PolicyConfig(
            max_model_len=built.resolved.max_model_len,
            max_num_batched_tokens=built.resolved.max_num_batched_tokens,
        ),
        built.executor.info,
        WallClock(),
    )
    with pytest.raises(OutOfMemoryError):
        build_executor(
            ExecutorConfig(model=str(directory), device="cpu", kv_cache_memory_bytes=enough - 1)
        )


@pytest.mark.parametrize("cap", [None, 1 << 17])
def test_a_sample_of_a_job_finds_room_beside_the_longest_request(
    directory: Path, cap: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if cap is not None:
        monkeypatch.setitem(build._CACHE_CAP_BYTES, "cpu", cap)
    built = build_executor(
        ExecutorConfig(model=str(directory), device="cpu", max_num_seqs=1, max_finetune_samples=8)
    )
    resolved, layout = built.resolved, built.context.layout
    assert (resolved.max_model_len < built.config.max_context) == (cap is not None)
    one = layout.pages_for_sequence(resolved.max_model_len, resolved.max_num_batched_tokens)
    whole = layout.pages_for_sequence(resolved.max_model_len, resolved.max_model_len)
    assert built.executor.info.num_pages >= 1 + one + whole


def test_a_context_too_long_for_the_memory_at_hand_is_cut_with_a_warning(
    directory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(build, "free_memory_bytes", lambda device: 250_000)
    settings = {"model": str(directory), "device": "cpu", "max_num_batched_tokens": 16}
    built = build_executor(ExecutorConfig(**settings))
    cut = built.resolved.max_model_len
    assert 16 <= cut < 128
    assert f"max_model_len is {cut} instead of the model's 128" in caplog.text
    layout, num_pages = built.context.layout, built.executor.info.num_pages
    assert layout.pages_for_sequence(cut, 16) < num_pages
    assert layout.pages_for_sequence(cut + 16, 16) >= num_pages
    with pytest.raises(OutOfMemoryError, match="there is room for"):
        build_executor(ExecutorConfig(**settings, max_model_len=128))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"max_model_len": 129}, ConfigError, "max_model_len is 129.*128"),
        ({"max_num_seqs": 0}, ConfigError, "max_num_seqs is 0"),
        ({"max_model_len": 1}, ConfigError, "max_model_len is 1; it must be at least 2"),
        ({"num_threads": 1.5}, ConfigError, "num_threads is 1.5; it must be a whole number"),
        ({"kv_cache_memory_bytes": 10**15}, OutOfMemoryError, r"10{15} \(.*cpu has \d+ bytes"),
        ({"model": ""}, ModelLoadError, "'' is neither"),
        ({"dtype": "int8"}, ConfigError, "dtype is 'int8'.*float32"),
        ({"device": "tpu"}, ConfigError, "device is 'tpu'"),
        ({"device": "cuda:99"}, ConfigError, "cuda:99"),
        ({"tensor_parallel_size": 2}, UnsupportedError, "tensor_parallel_size is 2"),
        ({"model": "/nowhere/at/all"}, ModelLoadError, "neither a model directory nor a hub id"),
        ({"model": "just-a-name"}, ModelLoadError, "neither a model directory nor a hub id"),
    ],
)
def test_bad_settings_are_named(
    directory: Path, changes: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        build_executor(
            ExecutorConfig(**{"model": str(directory), "device": "cpu", **changes})  # type: ignore[arg-type]
        )


def test_a_hub_id_without_a_hub_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelLoadError, match=r"nobody/nothing is no directory.*HF_HUB_OFFLINE"):
        build.resolve_model("nobody/nothing")


def test_auto_dtype_avoids_what_the_cpu_is_slow_at(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert resolve_dtype("auto", "float16", cpu) is torch.float32
    assert resolve_dtype("float16", "float32", cpu) is torch.float16
    for has_bfloat16, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(build, "_has_fast_bfloat16", lambda answer=has_bfloat16: answer)
        assert resolve_dtype("auto", "bfloat16", cpu) is expected


@pytest.mark.parametrize("name", CONFIGS)
def test_pages_of_every_group_fit_and_hold_all_layers(name: str) -> None:
    config = ModelConfig.from_dict(CONFIGS[name].to_dict())
    layout = kv_layout(config, torch.bfloat16)
    assert sorted(layer for group in layout.groups for layer in group.layers) == [0, 1, 2]
    arena = torch.zeros((5, layout.page_bytes), dtype=torch.uint8)
    for index, group in enumerate(layout.groups):
        assert all(config.windows[layer] == group.window for layer in group.layers)
        view = layout.group_view(arena, index)
        view[3] = 1.0
        used = view[0].numel() * 2
        assert used <= layout.page_bytes < 2 * used + 64
        assert arena[3].any()
        assert not arena[[0, 1, 2, 4]].any()
        arena.zero_()
    assert min(group.page_tokens for group in layout.groups) == 16
