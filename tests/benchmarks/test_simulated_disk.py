"""The benchmarks' copies of models: dense tensors as they are, experts' weights zeros, files no shorter."""

import os
from pathlib import Path

import mlx.core as mx
from benchmarks.peers.simulated_disk import copy

from ..support.models import make_converted


def test_a_copy_keeps_all_but_experts(tmp_path: Path) -> None:
    source, target = make_converted(tmp_path / "source", bits=4), tmp_path / "copy"
    (linked := tmp_path / "linked").mkdir()
    for path in source.iterdir():
        os.link(path, linked / path.name)
    made: dict[int, Path] = {}
    for folder, place in ((source, target), (linked, tmp_path / "copy-linked")):
        copy(folder, place, made)
    for path in source.iterdir():
        own = target / path.name
        assert own.stat().st_size == path.stat().st_size
        assert own.samefile(tmp_path / "copy-linked" / path.name)
        if path.suffix != ".safetensors":
            assert own.read_bytes() == path.read_bytes()
            continue
        tensors = mx.load(str(own))
        for name, value in mx.load(str(path)).items():
            expected = mx.zeros_like(value) if ".switch_mlp." in name else value
            assert mx.array_equal(tensors[name], expected), name
        assert any(".switch_mlp." in name for name in tensors)
        assert not all(".switch_mlp." in name for name in tensors)
