import os
import subprocess
import sys

import pytest

from flash_moe_mlx import command_buffers


def test_command_buffers_are_cut_by_operations_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLX_MAX_MB_PER_BUFFER", "77")
    command_buffers.lift_command_buffer_size()
    assert os.environ["MLX_MAX_MB_PER_BUFFER"] == "77"
    monkeypatch.delenv("MLX_MAX_MB_PER_BUFFER")
    command_buffers.lift_command_buffer_size()
    assert os.environ.pop("MLX_MAX_MB_PER_BUFFER") == command_buffers.MAX_MB_PER_BUFFER


def test_the_command_buffers_size_is_set_before_mlx_is_used():
    code = "import flash_moe_mlx, os; print(os.environ['MLX_MAX_MB_PER_BUFFER'])"
    environment = {name: value for name, value in os.environ.items() if name != "MLX_MAX_MB_PER_BUFFER"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == command_buffers.MAX_MB_PER_BUFFER


def test_importing_the_package_loads_no_foreign_function_library():
    code = "import sys, flash_moe_mlx; print('ctypes' in sys.modules or 'flash_moe_mlx.system' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "False"
