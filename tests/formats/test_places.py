"""One rule for paths and repositories, whichever function is called."""

import os
from pathlib import Path

import pytest

from flash_moe_mlx import load_model, pack, plan
from flash_moe_mlx.errors import CheckpointError
from flash_moe_mlx.formats.places import local_directory


def test_what_exists_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert local_directory("org/name", "load") == Path("org/name")
    assert local_directory("~/org/name", "load") == tmp_path / "org" / "name"


def test_two_parts_are_a_repository():
    assert local_directory("org/name-that-is-not-here", "load") is None


@pytest.mark.parametrize("name", ["name", "a/b/c", "/a/b", "./b", "../b", "~/b", "a\0/b/c", Path("org/name")])
@pytest.mark.parametrize("call", ["load", "plan", "pack"])
def test_the_rest_is_refused_everywhere_alike(
    call: str, name: str | Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")  # "../b" must not be there by chance
    calls = {
        "load": lambda: load_model(name, memory_limit="1GB"),
        "plan": lambda: plan(name, memory_limit="1GB"),
        "pack": lambda: pack(name, tmp_path / "packed"),
    }
    with pytest.raises(CheckpointError) as refused:
        calls[call]()
    assert str(refused.value).startswith(f"[{call}] {os.fspath(name)} must be a directory or a hub repository")
