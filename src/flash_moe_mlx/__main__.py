"""``python -m flash_moe_mlx`` is ``flash-moe``."""

from .cli.main import app

if __name__ == "__main__":
    app(prog_name="flash-moe")
