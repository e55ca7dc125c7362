"""Files written without copies are those that the safetensors library reads."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

from weft.train.checkpoint_writer import StreamingWriter


def values() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "plain": torch.randn(3, 5),
        "double": torch.randn(7, dtype=torch.float64),
        "low": torch.randn(4, 3).bfloat16(),
        "half": torch.randn(2).half(),
        "number": torch.tensor(3.5),
        "none": torch.zeros(0, 4),
        "flags": torch.tensor([True, False, True]),
        "counts": torch.arange(5),
        "turned": torch.randn(4, 6).t(),
    }


def save(path: Path, tensors: dict[str, Tensor]) -> None:
    path.mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state_dict_saver.save(
            tensors, storage_writer=StreamingWriter(path, save_distributed=False), no_dist=True
        )


def test_the_library_reads_what_was_written(tmp_path: Path) -> None:
    tensors = values()
    save(tmp_path / "found", tensors)
    (file,) = (tmp_path / "found").glob("*.safetensors")
    held = load_file(file)
    assert held.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert held[name].dtype == tensor.dtype
        assert torch.equal(held[name], tensor), name


def test_torch_reads_it_back(tmp_path: Path) -> None:
    tensors = values()
    save(tmp_path / "found", tensors)
    into = {name: torch.zeros_like(t).contiguous() for name, t in tensors.items() if t.numel()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state_dict_loader.load(
            into, storage_reader=HuggingFaceStorageReader(str(tmp_path / "found")), no_dist=True
        )
    for name, tensor in into.items():
        assert torch.equal(tensor, tensors[name]), name


def test_copies_lie_where_those_of_the_save_before_lay(tmp_path: Path) -> None:
    staged: dict[str, Tensor] = {}
    tensors = values()
    writer = StreamingWriter(tmp_path, save_distributed=False, staged=staged)
    first = writer.stage(tensors)
    places = {name: copy.data_ptr() for name, copy in first.items()}
    expected = tensors["plain"].clone()
    tensors["plain"].zero_()
    assert torch.equal(first["plain"], expected)
    del tensors["counts"]
    later = StreamingWriter(tmp_path, save_distributed=False, staged=staged).stage(tensors)
    assert later.keys() == tensors.keys()
    assert {name: copy.data_ptr() for name, copy in later.items()} == {
        name: place for name, place in places.items() if name != "counts"
    }
    assert not later["plain"].any()
