"""The README's four lines: load a checkpoint under a memory limit and generate.

python examples/quickstart.py [path/to/checkpoint]
"""

import sys
from importlib.resources import files

from flash_moe_mlx import generate, load

path = sys.argv[1] if len(sys.argv) > 1 else str(files("flash_moe_mlx") / "demo")

model, tokenizer = load(path, memory_limit="14MB", max_context=128)
prompt = tokenizer.apply_chat_template([{"role": "user", "content": "What is 17 + 25?"}], add_generation_prompt=True)
print(generate(model, tokenizer, prompt, max_tokens=50))
print(model.streaming.stats())
