import os
import subprocess
import sys

import pytest


def _output(code: str, **environment: str) -> str:
    inherited = {name: value for name, value in os.environ.items() if name != "MLX_MAX_MB_PER_BUFFER"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=inherited | environment, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


@pytest.mark.parametrize(("environment", "value"), [({}, "1000"), ({"MLX_MAX_MB_PER_BUFFER": "77"}, "77")])
def test_command_buffers_are_cut_by_operations_alone_unless_the_user_says_otherwise(
    environment: dict[str, str], value: str
):
    assert _output("import flash_moe_mlx, os; print(os.environ['MLX_MAX_MB_PER_BUFFER'])", **environment) == value


def test_importing_the_package_loads_no_foreign_function_library():
    code = "import sys, flash_moe_mlx; print('ctypes' in sys.modules or 'flash_moe_mlx.system' in sys.modules)"
    assert _output(code) == "False"


def test_importing_the_package_imports_none_of_its_modules():
    code = "import sys, flash_moe_mlx; print([name for name in sys.modules if name.startswith('flash_moe_mlx.')])"
    assert _output(code) == "[]"
