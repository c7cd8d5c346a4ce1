"""Packings of one rank's share: the whole packing's records and files, resumed and verified, or refused."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
from typer.testing import CliRunner

from flash_moe_mlx import load_model, pack, verify
from flash_moe_mlx.cli.main import app
from flash_moe_mlx.config import StreamingConfig
from flash_moe_mlx.errors import CorruptError, DistributedError, PackError, RequestError
from flash_moe_mlx.experts.placement import Placement
from flash_moe_mlx.formats.checkpoint import Checkpoint
from flash_moe_mlx.formats.packed_format import MANIFEST_NAME, parse_manifest, read_manifest
from flash_moe_mlx.packing import PackSettings, open_packing, parse_share
from flash_moe_mlx.packing import hub as packing_hub
from flash_moe_mlx.runtime.sharding import own_directory, share_experts

from ..formats.test_packed_format import seal
from ..support.checkpoints import make_checkpoint, text_config
from ..support.hub import REPOSITORY, Hub, serve
from ..support.packing import contents, small_tasks, stop_at

EXPERTS = 6


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = text_config(num_hidden_layers=2, full_attention_interval=2, num_experts=EXPERTS)
    return make_checkpoint(tmp_path_factory.mktemp("source") / "model", bits=4, config=config, shards=2)


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(source, tmp_path_factory.mktemp("whole") / "packed", bits=3)


@pytest.fixture(scope="module")
def shares(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that ``pack --shards 2`` writes."""
    folder = tmp_path_factory.mktemp("shares") / "packed"
    result = CliRunner().invoke(app, ["pack", str(source), str(folder), "--bits", "3", "--shards", "2", "--json"])
    assert result.exit_code == 0, result.output
    assert [Path(each["path"]).name for each in json.loads(result.stdout)] == ["0-of-2", "1-of-2"]
    return folder


def records(checkpoint: Checkpoint, layer: int, experts: Any) -> dict[int, bytes]:
    found = {}
    for expert in experts:
        (where,) = checkpoint.ranges(layer, expert)
        with where.path.open("rb") as file:
            file.seek(where.file_offset)
            found[expert] = file.read(where.nbytes)
    return found


def test_shares_hold_the_records_and_files_of_the_whole(whole: Path, shares: Path):
    everything, parts = Checkpoint.open(whole), [Checkpoint.open(shares / f"{rank}-of-2") for rank in (0, 1)]
    placement = Placement.by_number(dict.fromkeys(everything.moe_layers, EXPERTS), 2)
    for layer in everything.moe_layers:
        together: dict[int, bytes] = {}
        for rank, part in enumerate(parts):
            assert part.manifest is not None and part.num_experts(layer) == EXPERTS
            own = part.manifest.layers[layer].experts
            assert own == tuple(np.flatnonzero(placement.owners[layer] == rank))
            together |= records(part, layer, own)
            assert all(part.checksum(layer, expert) == everything.checksum(layer, expert) for expert in own)
            other = next(expert for expert in range(EXPERTS) if expert not in own)
            with pytest.raises(RequestError, match=f"must be in this checkpoint, got share {rank} of 2"):
                part.ranges(layer, other)
        assert together == records(everything, layer, range(EXPERTS))
    for part in parts:
        assert part.manifest is not None and part.manifest.share is not None
        assert part.manifest.share.placement == placement.digest
        files = {name: data for name, data in contents(part.directory).items() if not name.startswith("experts")}
        assert files == {name: data for name, data in contents(whole).items() if not name.startswith("experts")}


def test_a_share_is_verified_against_its_source(source: Path, shares: Path, tmp_path: Path):
    report = verify(shares / "1-of-2", full=True, against=source)
    assert report.ok and (report.records, report.all_records, report.compared) == (EXPERTS, EXPERTS, 4)
    assert "packed, share 1 of 2" in str(report)
    damaged = Path(shutil.copytree(shares / "1-of-2", tmp_path / "damaged"))
    path = damaged / "experts" / "layer_00.safetensors"
    data = bytearray(path.read_bytes())
    data[-16384] ^= 1  # in the last record: layer 0 gives rank 1 the odd experts
    path.write_bytes(data)
    assert [problem.expert for problem in verify(damaged, full=True).problems] == [5]


def test_an_interrupted_share_resumes_and_no_other_one_takes_its_place(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Placed by a plan file: the first layer's rank 0 has one expert, in the middle."""
    plan = tmp_path / "plan.json"
    owners = {0: np.array([1, 1, 0, 1, 1, 1]), 1: np.array([0, 0, 1, 1, 0, 1])}
    Placement(2, owners).write(plan)
    small_tasks(monkeypatch, 1 << 12)
    how: dict[str, Any] = {"bits": None, "placement": plan}
    expected = contents(pack(source, tmp_path / "once", shard="1/2", **how))
    target = tmp_path / "packed"
    with pytest.raises(KeyboardInterrupt):
        pack(source, target, shard="1/2", progress=stop_at(0.5), **how)
    with pytest.raises(PackError, match="can only continue with the same"):
        pack(source, target, shard="0/2", **how)
    with open_packing(source, target, PackSettings(None), share=parse_share("1/2", plan)) as packing:
        assert 0 < packing.estimate().remaining_bytes < packing.plan.result_bytes
    assert contents(pack(source, target, shard="1/2", **how)) == expected
    manifest = read_manifest(target)
    assert manifest is not None and manifest.layers[0].experts == (0, 1, 3, 4, 5)
    sizes = {name: len(data) for name, data in expected.items() if name.endswith(".safetensors")}
    assert sizes == packing.plan.file_sizes
    with pytest.raises(PackError, match="got one of another source or share"):
        pack(source, target, shard="0/2", **how)
    with pytest.raises(PackError, match="got one of another source or share"):
        pack(source, target, shard="1/2", bits=None)  # dealt out by number


@pytest.mark.parametrize("shard", ["2/2", "0/1", "1", "-1/2", "0/2/3", "", 2])
def test_shards_refused(source: Path, tmp_path: Path, shard: Any):
    with pytest.raises(RequestError, match=r"\[shard\] must be rank/ranks"):
        pack(source, tmp_path / "packed", shard=shard)


def test_what_cannot_be_shared_is_refused(source: Path, shares: Path, tmp_path: Path):
    with pytest.raises(RequestError, match=r"\[source\] .* must hold all experts, got share 0 of 2"):
        pack(shares / "0-of-2", tmp_path / "packed", bits=None)
    with pytest.raises(RequestError, match="7 ranks must keep an expert of each layer"):
        pack(source, tmp_path / "packed", shard="0/7")
    with pytest.raises(RequestError, match=r"\[placement\] must come with a shard"):
        pack(source, tmp_path / "packed", placement=tmp_path / "plan.json")
    for options, message in ((["--shards", "1"], "at least 2"), (["--shards", "2", "--shard", "0/2"], "too")):
        result = CliRunner().invoke(app, ["pack", str(source), str(tmp_path / "packed"), *options])
        assert result.exit_code == 2 and message in result.output


def change(manifest: Path, **fields: Any) -> bytes:
    value = json.loads(manifest.read_bytes())
    value.pop("manifest_crc32")
    return seal(value | fields)


def test_manifests_that_contradict_themselves_are_refused(shares: Path):
    path = shares / "0-of-2" / MANIFEST_NAME
    value = json.loads(path.read_bytes())
    first, second = value["layers"]
    assert value["version"] == 2 and parse_manifest(path.read_bytes()).to_bytes() == path.read_bytes()
    for fields, message in (
        ({"share": value["share"] | {"placement": "00000000"}}, "share's placement must be that"),
        ({"share": value["share"] | {"rank": 2}}, "share's rank must be an integer from 0 to 1"),
        ({"share": value["share"] | {"ranks": 1}}, "share's ranks must be an integer from 2"),
        ({"version": 1}, "the manifest must be an object of"),
        ({"layers": [first | {"owners": [0, 1, 0]}, second]}, "owners must list a rank for each of 6"),
        ({"layers": [first | {"owners": [0] * EXPERTS}, second]}, "each of 2 ranks must own an expert"),
        ({"layers": [first | {"owners": [0, 1, 0, 1, 0, 2]}, second]}, "owner must be an integer from 0 to 1"),
        ({"layers": [first | {"owners": [0, 0, 0, 0, 1, 1]}, second]}, "crc32 must be 4 times 8"),
        ({"layers": [{k: v for k, v in first.items() if k != "owners"}, second]}, "a layer must be an object of"),
    ):
        with pytest.raises(CorruptError, match=message):
            parse_manifest(change(path, **fields))


# --- from a hub ---


def test_only_the_share_is_downloaded_from_a_hub(
    source: Path, whole: Path, shares: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """No request asks for a byte of another rank's experts, and a connection that ends early is continued."""
    checkpoint = Checkpoint.open(source)
    placement = Placement.by_number(dict.fromkeys(checkpoint.moe_layers, EXPERTS), 2)
    others = [
        (where.path.name, where.file_offset, where.file_offset + where.nbytes)
        for layer in checkpoint.moe_layers
        for expert in np.flatnonzero(placement.owners[layer] != 1)
        for where in checkpoint.ranges(layer, int(expert))
    ]
    monkeypatch.setattr(packing_hub, "_RETRY_SECONDS", 0.0)
    with serve(source) as hub:
        use_hub(hub, monkeypatch)
        with open_packing(
            REPOSITORY, tmp_path / "packed", PackSettings(3), from_hub=True, share=parse_share("1/2")
        ) as packing:
            ranges = packing.plan.reads()
            held = packing.source.held_bytes
            hub.ranges.clear()  # those of headers
            hub.downloads.clear()
            hub.cut = {some[len(some) // 2][0] for some in ranges.values()}
            packing.run(False)
    assert not hub.cut and all(first > 0 for _, first in hub.downloads)
    for name, first, last in hub.ranges:
        assert not any(name == file and first < end and begin <= last for file, begin, end in others)
    asked = sum(last + 1 - first for _, first, last in hub.ranges)
    needed = sum(end - begin for some in ranges.values() for begin, end in some)
    assert needed == held < asked < 2 * needed  # two shards; those that were cut have been asked for again
    made, expected = contents(tmp_path / "packed"), contents(shares / "1-of-2")
    assert made.keys() == expected.keys()
    assert all(data == expected[name] for name, data in made.items() if name != MANIFEST_NAME)


def use_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use another hub, as HF_ENDPOINT does when huggingface_hub is imported."""
    template = f"{hub.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.endpoint)
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


# --- what load makes of them ---


def ranks(rank: int, size: int) -> Any:
    """Return a group whose other ranks answer what this one says."""
    return SimpleNamespace(rank=rank, size=size, gather=lambda value, **_: [value] * size)


def test_the_fingerprint_is_the_same_on_every_rank(whole: Path, shares: Path):
    told: dict[tuple[str, int], list[int]] = {}

    def gathering(name: str, rank: int) -> Any:
        def gather(value: int, **_: Any) -> list[int]:
            told.setdefault((name, rank), []).append(value)
            return [value] * 2

        return SimpleNamespace(rank=rank, size=2, gather=gather)

    config = StreamingConfig.from_arguments(None, 64, None, "auto")
    for rank in (0, 1):
        for name, directory in (("share", shares / f"{rank}-of-2"), ("whole", whole)):
            share = share_experts(gathering(name, rank), Checkpoint.open(directory), config, None)
            assert share is not None and share.counts() == {0: 3, 1: 3}
    assert len(told) == 4 and len({tuple(values[:-1]) for values in told.values()}) == 1
    assert all(values[-1] == (name == "whole") for (name, _), values in told.items())  # whether it can read all experts


def test_a_share_of_another_rank_is_refused(shares: Path, tmp_path: Path):
    own, config = Checkpoint.open(shares / "1-of-2"), StreamingConfig.from_arguments(None, 64, None, "auto")
    for group, whom in ((ranks(0, 2), "rank 0 of 2"), (ranks(1, 3), "rank 1 of 3"), (None, "a process on its own")):
        with pytest.raises(RequestError, match=f"got share 1 of 2 for {whom}. Start 2 ranks with mlx.launch"):
            share_experts(group, own, config, None)
    plan = tmp_path / "plan.json"
    Placement(2, {layer: np.array([1, 0, 0, 0, 0, 0]) for layer in (0, 1)}).write(plan)
    with pytest.raises(RequestError, match=r"\[shard\] .* must be the plan that .* was packed with"):
        share_experts(ranks(1, 2), own, config, plan)
    with pytest.raises(RequestError, match="got share 1 of 2 for a process on its own"):
        load_model(shares / "1-of-2", memory_limit="200MB", max_context=64)


def test_each_rank_finds_its_own_folder(whole: Path, shares: Path, tmp_path: Path):
    assert own_directory(shares, ranks(1, 2)) == shares / "1-of-2"
    assert own_directory(whole, ranks(1, 2)) == whole and own_directory(tmp_path, None) == tmp_path
    for group, whom in ((ranks(1, 3), "rank 1 of 3"), (None, "a process on its own")):
        with pytest.raises(RequestError, match=f"got 0-of-2, 1-of-2 for {whom}"):
            own_directory(shares, group)


def test_other_ranks_checkpoints_are_compared(shares: Path):
    def gather(value: int, **_: Any) -> list[int]:
        return [value, value ^ 1]

    group: Any = SimpleNamespace(rank=0, size=2, gather=gather)
    config = StreamingConfig.from_arguments(None, 64, None, "auto")
    with pytest.raises(DistributedError, match="all must have the same version"):
        share_experts(group, Checkpoint.open(shares / "0-of-2"), config, None)
