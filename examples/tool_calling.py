"""Lets a model call tools: the built-in calculator, and the functions of a file.

python examples/tool_calling.py [path/to/checkpoint]
"""

import sys
from importlib.resources import files
from pathlib import Path

from flash_moe_mlx import (
    CALCULATOR,
    Conversation,
    Part,
    PrefixCache,
    ToolCall,
    ToolOutcome,
    load,
    load_tools,
)

path = sys.argv[1] if len(sys.argv) > 1 else str(files("flash_moe_mlx") / "demo")
WEATHER = Path(__file__).parent / "tools" / "weather.py"


def confirm(call: ToolCall) -> bool:
    """Confirm a call before it is run. Both tools here are harmless, so this only looks at the name."""
    return call.name in ("calculate", "get_weather")


model, tokenizer = load(path, max_context=1024)
with model.streaming, PrefixCache(model, "50MB") as cache:
    tools = [*load_tools(CALCULATOR), *load_tools(WEATHER)]
    chat = Conversation(model, tokenizer, tools=tools, confirm=confirm, prefix_cache=cache)
    for question in ("What is 17 + 25?", "What is the weather in Lisbon?"):
        print(f"> {question}")
        for event in chat.send(question):
            match event:
                case Part(kind="text"):
                    print(event.text, end="", flush=True)
                case ToolCall():
                    print(f"calls {event}")
                case ToolOutcome():
                    print(f"gets {event.result.text}")
        print("\n")
