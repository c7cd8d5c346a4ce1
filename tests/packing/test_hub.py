"""--from-hub against a server of our own: what it downloads, how much disk it holds, and what it makes of faults."""

import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from flash_moe_mlx import pack, verify
from flash_moe_mlx.formats.packed_format import WORK_FOLDER

from ..support.checkpoints import make_checkpoint
from ..support.hub import COMMIT, REPOSITORY, Hub, serve
from ..support.models import chat_config, write_tokenizer
from ..support.packing import contents

pytestmark = pytest.mark.xdist_group("hub")

PACK = """
import json, os, sys
from flash_moe_mlx import FlashMoEError, pack
for repository, stop in json.loads(sys.argv[2]):
    def report(moment):
        if stop and stop in moment.step:
            raise KeyboardInterrupt
    try:
        pack(repository, sys.argv[1], bits=4, from_hub=True, progress=report)
        print("packed")
    except FlashMoEError as error:
        print(type(error).__name__, error)
    except KeyboardInterrupt:
        print("stopped")
"""
SHARDS = [f"model-{number:05}-of-00006.safetensors" for number in range(1, 7)]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six shards of about 2.5 MB; a layer's experts lie in more than one."""
    config = chat_config(dtype="bfloat16", num_hidden_layers=3, full_attention_interval=3, num_experts=40)
    directory = make_checkpoint(tmp_path_factory.mktemp("source") / "model", "hf-fused", config=config, shards=6)
    write_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def expected(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The same packed from the directory. Its manifest names another source."""
    return contents(pack(source, tmp_path_factory.mktemp("expected") / "packed", bits=4))


def held_bytes(directory: Path) -> int:
    """Disk that a directory takes: blocks, so that holes count as nothing."""
    total = 0
    for folder, _, names in os.walk(directory):  # which passes over what is removed meanwhile
        for name in names:
            with suppress(FileNotFoundError):
                total += os.stat(os.path.join(folder, name)).st_blocks * 512
    return total


def run(hub: Hub, destination: Path, attempts: list[tuple[str, str]]) -> tuple[list[str], int]:
    """Pack in a process of its own, since huggingface_hub reads HF_ENDPOINT when it is imported.

    Args:
        hub: The server.
        destination: Destination of all attempts.
        attempts: (repository, a word in the step at which to interrupt it, or "").

    Returns:
        How each attempt ended, and the most disk that the destination held.
    """
    environment = os.environ | {"HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"}
    child = subprocess.Popen(
        [sys.executable, "-c", PACK, destination, json.dumps(attempts)], env=environment, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    most = 0
    while child.poll() is None:
        most = max(most, held_bytes(destination))
        time.sleep(0.01)
    output, errors = child.communicate()
    assert child.returncode == 0, errors
    return output.splitlines(), most


def test_shard_by_shard(source: Path, expected: dict[str, bytes], tmp_path: Path):
    with serve(source) as hub:
        hub.dropped = {SHARDS[2]}
        hub.shortened = {SHARDS[4]: 1}
        ends, most = run(hub, tmp_path / "packed", [(REPOSITORY, "")])
    assert ends == ["packed"]
    made = contents(tmp_path / "packed")
    assert made.keys() == expected.keys()
    assert {n: d for n, d in made.items() if n != "experts.json"} == {
        n: d for n, d in expected.items() if n != "experts.json"
    }
    manifest = json.loads(made["experts.json"])
    assert (manifest["source"]["name"], manifest["source"]["revision"]) == (REPOSITORY, COMMIT)
    assert verify(tmp_path / "packed", full=True, against=source).ok
    begun = [name for name, first in hub.downloads if name in SHARDS and first == 0]
    assert [name for i, name in enumerate(begun) if i == 0 or name != begun[i - 1]] == SHARDS  # in order, one by one
    assert [name for name, _ in hub.downloads].count(SHARDS[2]) == 2
    assert not hub.dropped and hub.shortened[SHARDS[4]] == 0
    result = sum(map(len, made.values()))
    shards = sorted(path.stat().st_size for path in source.glob("*.safetensors"))
    # Blocks, the journal, and the few tensors that are kept until the end come on top.
    assert most < result + sum(shards[-2:]) + 1_000_000
    assert most < result + 0.75 * sum(shards)  # and so not the source as well


def test_what_the_hub_announced_is_what_is_packed(source: Path, expected: dict[str, bytes], tmp_path: Path):
    """A shard that is too short twice, one with a flipped bit, an interrupt: packing continues where it stopped."""
    destination = tmp_path / "packed"
    with serve(source) as hub:
        hub.shortened, hub.altered = {SHARDS[1]: 2}, {SHARDS[3]: 2}
        nowhere = ("someone/else", "")
        ends, _ = run(hub, destination, [nowhere, (REPOSITORY, ""), (REPOSITORY, ""), (REPOSITORY, SHARDS[5])])
        assert ends[0].startswith("CheckpointError [someone/else] the repository must be served by the hub")
        assert ends[1].startswith("PackError") and SHARDS[1] in ends[1] and "the same command continues" in ends[1]
        assert ends[2].startswith("PackError") and SHARDS[3] in ends[2] and "SHA-256" in ends[2]
        assert ends[3] == "stopped"
        assert os.listdir(destination) == [WORK_FOLDER]
        hub.downloads.clear()
        assert run(hub, destination, [(REPOSITORY, "")])[0] == ["packed"]
        assert {name for name, _ in hub.downloads if name in SHARDS} == {SHARDS[5]}  # the others are done
    made = contents(destination)
    assert {n: d for n, d in made.items() if n != "experts.json"} == {
        n: d for n, d in expected.items() if n != "experts.json"
    }
