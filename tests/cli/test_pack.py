"""flash-moe pack and verify: options, machine-readable output and exit codes."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flash_moe_mlx.cli.main import app
from flash_moe_mlx.formats.checkpoint import Checkpoint
from flash_moe_mlx.formats.expert_layout import Quantization

from ..support.checkpoints import make_checkpoint, text_config

RUNNER = CliRunner()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = text_config(num_hidden_layers=4)
    return make_checkpoint(tmp_path_factory.mktemp("source") / "model", bits=4, config=config)


def run(*arguments: object, code: int = 0) -> str:
    result = RUNNER.invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result.stdout if code == 0 or result.stdout else result.stderr


def test_pack_and_verify(source: Path, tmp_path: Path):
    packed = tmp_path / "packed"
    estimate = json.loads(run("pack", source, packed, "--bits", 2, "--dry-run", "--json"))
    assert estimate["remaining_bytes"] < estimate["needed_bytes"]
    assert "disk needed" in run("pack", source, packed, "--bits", 2, "--dry-run")
    assert not packed.exists()
    text = run("pack", source, packed, "--bits", 2, "--down-bits", 6, "--layers", "1-2=3", "--layers", "3=8")
    assert "lossy: up_proj: 4-bit to 3 bits" in text and "up_proj: error" in text
    checkpoint = Checkpoint.open(packed)
    assert [checkpoint.layout(layer).quantization("up_proj") for layer in range(4)] == [
        Quantization(bits, 64) for bits in (2, 3, 3, 8)
    ]
    assert checkpoint.layout(0).quantization("down_proj") == Quantization(6, 64)
    assert "good" in run("verify", packed, "--full", "--against", source)
    result = json.loads(run("verify", packed, "--json"))
    assert result["ok"] is True and result["problems"] == []
    path = packed / "experts" / "layer_00.safetensors"
    data = bytearray(path.read_bytes())
    data[20_000] ^= 1
    path.write_bytes(data)
    result = json.loads(run("verify", packed, "--json", "--full", code=1))
    assert [problem["expert"] for problem in result["problems"]] == [0]
    assert "FAILED: 1 problem\n" in run("verify", packed, "--full", code=1)


def test_unchanged_bits(source: Path, tmp_path: Path):
    result = json.loads(run("pack", source, tmp_path / "packed", "--bits", "unchanged", "--json"))
    assert result["lossy"] == [] and result["quantization_error"] == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--bits", "many"], '[--bits] must be a number, or "unchanged"'),
        (["--bits", "7"], "[bits] must be one of"),
        (["--layers", "0-3"], "[--layers] must be layers and bits, such as 0-3=6"),
        (["--layers", "0-99999999=4"], "[--layers] must name layers"),
        (["--layers", "99=4"], "[--layers] layer 99 has no experts"),
        (["--dense", "no"], "Invalid value for '--dense'"),
        (["--group-size", "7"], "[group_size] must be"),
    ],
)
def test_refused(source: Path, tmp_path: Path, options: list[str], message: str):
    assert message in run("pack", source, tmp_path / "packed", *options, code=2)
