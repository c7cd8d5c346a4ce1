"""Published checkpoints' config.json and header shapes, as holes of their size, go through plan and load's checks."""

from pathlib import Path

import pytest

from flash_moe_mlx import plan
from flash_moe_mlx.config import StreamingConfig
from flash_moe_mlx.runtime.loading import inspect_checkpoint

from ..support.published import PUBLISHED, write_holes

PAGE = Path(__file__).parents[2] / "docs" / "models.md"


@pytest.mark.parametrize("name", PUBLISHED)
def test_accepted_with_the_right_bytes(name: str, tmp_path: Path):
    directory = write_holes(tmp_path, name, short=True)
    checkpoint, spec = inspect_checkpoint(directory, StreamingConfig())
    layer = checkpoint.moe_layers[0]
    payload = checkpoint.layout(layer).payload_bytes
    assert payload == PUBLISHED[name].payload_bytes
    text = PUBLISHED[name].config.get("text_config", PUBLISHED[name].config)
    assert spec.num_experts_per_tok == text["num_experts_per_tok"]
    planned = plan(directory, memory_limit="400GB", disk_bytes_per_second=3e9)
    assert payload <= planned.record_bytes < payload + 8192
    assert planned.num_experts == sum(checkpoint.num_experts(own) for own in checkpoint.moe_layers)
    assert f"| `{name}` |" in PAGE.read_text()
    assert f" {payload:,} bytes |" in next(line for line in PAGE.read_text().splitlines() if f"`{name}`" in line)
