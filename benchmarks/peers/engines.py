from pathlib import Path

DRIVER = Path("/tmp/w/llama/bin/llama-driver")
