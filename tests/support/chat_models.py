"""Model families of the tests: templates of our own with the property of each that matters, and small vocabularies.

A vocabulary has a token for every byte, a few words, and the family's markers.
"""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from mlx_lm.tokenizer_utils import load as load_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from flash_moe_mlx.chat.answer import Part
from flash_moe_mlx.chat.reader import AnswerReader, Piece

WORDS = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Family:
    """A family of models: its template, its markers, and the token that ends an answer."""

    name: str
    template: str
    markers: tuple[str, ...]
    eos: str
    written: bool = False  # whether arguments are written without quotes

    @property
    def tokenizer(self) -> Any:
        return make_tokenizer(self.template, (*self.markers, self.eos), self.eos)


@cache
def make_tokenizer(template: str, specials: tuple[str, ...], eos: str, bos: str | None = None) -> Any:
    """A tokenizer as mlx_lm loads it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        vocabulary = {piece: i for i, piece in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_tokens([AddedToken(word, normalized=False) for word in WORDS])
        tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in dict.fromkeys(specials)])
        tokenizer.save(str(folder / "tokenizer.json"))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos} | (
            {"bos_token": bos} if bos else {}
        )
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        (folder / "chat_template.jinja").write_text(template)
        return load_tokenizer(folder)


_THINK = "<think>", "</think>"
_CHATML = ("<|endoftext|>", "<|im_start|>")
_TAGS = ("<tool_call>", "</tool_call>")

# As published templates have it: an answer that holds the marker is taken apart, unless its thinking comes separately.
_SPLIT = """{%- set content = m.content %}{%- set reasoning = m.reasoning_content if m.reasoning_content is string else '' %}{%- if m.role == 'assistant' and m.reasoning_content is not string and '</think>' in content %}{%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}"""
_XML_CALLS = """{%- for c in m.tool_calls or [] %}{{- ('\\n\\n' if loop.first and m.content else '\\n' if not loop.first else '') + '<tool_call>\\n<function=' + c.function.name + '>\\n' }}{%- for k, v in c.function.arguments|items %}{{- '<parameter=' + k + '>\\n' + (v if v is string else v|tojson) + '\\n</parameter>\\n' }}{%- endfor %}{{- '</function>\\n</tool_call>' }}{%- endfor %}"""
_JSON_CALLS = """{%- for tool_call in m.tool_calls or [] %}{%- set tool_call = tool_call.function %}{{- ('\\n' if not loop.first or m.content else '') + '<tool_call>\\n{"name": "' + tool_call.name + '", "arguments": ' + tool_call.arguments|tojson + '}\\n</tool_call>' }}{%- endfor %}"""

QWEN3_5 = Family(
    "qwen3.5",
    """{%- for m in messages %}{%- if m.role == 'system' and not loop.first %}{{- raise_exception('System message must be at the beginning.') }}{%- endif %}{{- '<|im_start|>' + m.role + '\n' }}"""
    + _SPLIT
    + """{%- if m.role == 'assistant' %}{{- '<think>\n' + reasoning|trim('\n') + '\n</think>\n\n' }}{%- endif %}{{- content }}"""
    + _XML_CALLS
    + """{{- '<|im_end|>\n' }}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' + ('<think>\n\n</think>\n\n' if enable_thinking is false else '<think>\n') }}{%- endif %}""",
    (*_CHATML, *_THINK, *_TAGS), "<|im_end|>", written=True,
)  # fmt: skip
QWEN3_CODER = Family(
    "qwen3-coder",
    """{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' + m.content }}"""
    + _XML_CALLS
    + """{{- '<|im_end|>\n' }}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}""",
    (*_CHATML, *_TAGS), "<|im_end|>", written=True,
)  # fmt: skip
QWEN3_NEXT = Family(
    "qwen3-next",
    """{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' }}{%- set content = m.content %}{%- if m.role == 'assistant' %}{%- set reasoning = m.reasoning_content or '' %}{%- if '</think>' in content %}{%- set reasoning = content.split('</think>')[0].split('<think>')[-1] %}{%- set content = content.split('</think>')[-1] %}{%- endif %}{%- if reasoning %}{{- '<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' }}{%- endif %}{%- endif %}{{- content }}"""
    + _JSON_CALLS
    + """{{- '<|im_end|>\n' }}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}""",
    (*_CHATML, *_THINK, *_TAGS), "<|im_end|>",
)  # fmt: skip
GLM = Family(
    "glm-4.6",
    """[gMASK]{%- for m in messages %}{{- '<|' + m.role + '|>' }}"""
    + _SPLIT
    + """{%- if m.role == 'assistant' %}{{- '\n<think>' + reasoning + '</think>' }}{%- endif %}{{- '\n' + content if content or m.role != 'assistant' else '' }}{%- for c in m.tool_calls or [] %}{{- '\n<tool_call>' + c.function.name }}{%- for k, v in c.function.arguments|items %}{{- '\n<arg_key>' + k + '</arg_key>\n<arg_value>' + (v if v is string else v|tojson) + '</arg_value>' }}{%- endfor %}{{- '\n</tool_call>' }}{%- endfor %}{%- endfor %}{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}""",
    ("[gMASK]", "<|endoftext|>", "<|system|>", "<|assistant|>", "<|tool|>", *_THINK, *_TAGS,
     "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"), "<|user|>", written=True,
)  # fmt: skip
KIMI = Family(
    "kimi-k2",
    """{%- for m in messages %}{{- '<|im_' + m.role + '|>' + m.role + '<|im_middle|>' }}{%- if m.role == 'tool' %}{{- '## Return of ' + m.tool_call_id + '\n' }}{%- endif %}{{- m.content }}{%- if m.tool_calls %}{{- '<|tool_calls_section_begin|>' }}{%- for c in m.tool_calls %}{{- '<|tool_call_begin|>' + c.id + '<|tool_call_argument_begin|>' }}{%- if c.function.arguments is string %}{{- c.function.arguments }}{%- else %}{{- c.function.arguments|tojson }}{%- endif %}{{- '<|tool_call_end|>' }}{%- endfor %}{{- '<|tool_calls_section_end|>' }}{%- endif %}{{- '<|im_end|>' }}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_assistant|>assistant<|im_middle|>' }}{%- endif %}""",
    ("<|im_system|>", "<|im_user|>", "<|im_assistant|>", "<|im_tool|>", "<|im_middle|>", "<|tool_calls_section_begin|>",
     "<|tool_calls_section_end|>", "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"),
    "<|im_end|>",
)  # fmt: skip
DEEPSEEK = Family(
    "deepseek-v3.1",
    """{%- set ns = namespace(system='') %}{%- for m in messages %}{%- if m.role == 'system' %}{%- set ns.system = ns.system + ('\n\n' if ns.system else '') + m.content %}{%- endif %}{%- endfor %}{{- '<｜begin▁of▁sentence｜>' + ns.system }}{%- for m in messages %}{%- if m.role == 'user' %}{{- '<｜User｜>' + m.content }}{%- elif m.role == 'tool' %}{{- '<｜tool▁output▁begin｜>' + m.content + '<｜tool▁output▁end｜>' }}{%- elif m.role == 'assistant' %}{%- if loop.previtem is defined and loop.previtem.role != 'tool' %}{{- '<｜Assistant｜></think>' }}{%- endif %}{{- m.content.split('</think>', 1)[1] if '</think>' in m.content else m.content }}{%- for c in m.tool_calls or [] %}{{- ('<｜tool▁calls▁begin｜>' if loop.first else '') + '<｜tool▁call▁begin｜>' + c['function']['name'] + '<｜tool▁sep｜>' + c['function']['arguments'] + '<｜tool▁call▁end｜>' }}{%- endfor %}{{- ('<｜tool▁calls▁end｜>' if m.tool_calls else '') + '<｜end▁of▁sentence｜>' }}{%- endif %}{%- endfor %}{%- if add_generation_prompt and messages[-1].role != 'tool' %}{{- '<｜Assistant｜>' + ('<think>' if thinking else '</think>') }}{%- endif %}""",
    ("<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", *_THINK, "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>",
     "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>", "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>"),
    "<｜end▁of▁sentence｜>",
)  # fmt: skip
GPT_OSS = Family(
    "gpt-oss",
    """{%- for tool in tools or [] %}{{- '// ' + tool.function.description + '\n' }}{%- endfor %}{%- for m in messages %}{%- if m.role == 'assistant' %}{%- if '<|channel|>analysis<|message|>' in m.content %}{{- raise_exception('You have passed a message containing <|channel|> tags in the content field.') }}{%- endif %}{%- if m.content and m.thinking and m.tool_calls %}{{- raise_exception('Cannot pass both content and thinking in an assistant message with tool calls!') }}{%- endif %}{%- if m.tool_calls %}{{- '<|start|>assistant' }}{%- if m.thinking or m.content %}{{- '<|channel|>analysis<|message|>' + (m.thinking or m.content) + '<|end|><|start|>assistant' }}{%- endif %}{%- set c = m.tool_calls[0].function %}{{- '<|channel|>commentary to=functions.' + c.name + ' <|constrain|>json<|message|>' + c.arguments|tojson + '<|call|>' }}{%- else %}{{- '<|start|>assistant' }}{%- if m.thinking %}{{- '<|channel|>analysis<|message|>' + m.thinking + '<|end|><|start|>assistant' }}{%- endif %}{{- '<|channel|>final<|message|>' + m.content + '<|return|>' }}{%- endif %}{%- elif m.role == 'tool' %}{{- '<|start|>functions.f to=assistant<|channel|>commentary<|message|>' + m.content|tojson + '<|end|>' }}{%- elif m.role != 'system' or loop.first %}{{- '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{%- endif %}{%- endfor %}{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}""",
    ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|call|>"), "<|return|>",
)  # fmt: skip
MISTRAL = Family(
    "mistral",
    """{{- '<s>' }}{%- set ns = namespace(turn=0) %}{%- for m in messages %}{%- if m.role == 'user' or (m.role == 'assistant' and not m.tool_calls) %}{%- if (m.role == 'user') != (ns.turn % 2 == 0) %}{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{%- endif %}{%- set ns.turn = ns.turn + 1 %}{%- endif %}{%- endfor %}{%- for m in messages %}{%- if m.role == 'user' %}{{- '[INST]' + m.content + '[/INST]' }}{%- elif m.role == 'assistant' %}{{- m.content }}{%- for c in m.tool_calls or [] %}{%- if c.id|length != 9 %}{{- raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}{%- endif %}{{- ('[TOOL_CALLS][' if loop.first else ', ') + '{"name": "' + c.function.name + '", "arguments": ' + c.function.arguments|tojson + ', "id": "' + c.id + '"}' + (']' if loop.last else '') }}{%- endfor %}{{- '</s>' }}{%- elif m.role == 'tool' %}{%- if m.tool_call_id|length != 9 %}{{- raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}{%- endif %}{{- '[TOOL_RESULTS]' + m.content + m.tool_call_id + '[/TOOL_RESULTS]' }}{%- else %}{{- raise_exception('Only user, assistant and tool roles are supported!') }}{%- endif %}{%- endfor %}""",
    ("<s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[ARGS]", "[CALL_ID]"), "</s>",
)  # fmt: skip
MINIMAX = Family(
    "minimax-m2",
    """{%- for m in messages %}{{- ']~b]' + m.role + '\n' }}"""
    + _SPLIT
    + """{%- if m.role == 'assistant' %}{{- '<think>\n' + reasoning + '\n</think>\n\n' }}{%- endif %}{{- content }}{%- if m.tool_calls %}{{- '\n<minimax:tool_call>' }}{%- for c in m.tool_calls %}{{- '\n<invoke name="' + c.function.name + '">' }}{%- for k, v in c.function.arguments|items %}{{- '\n<parameter name="' + k + '">' + (v if v is string else v|tojson) + '</parameter>' }}{%- endfor %}{{- '\n</invoke>' }}{%- endfor %}{{- '\n</minimax:tool_call>' }}{%- endif %}{{- '[e~[\n' }}{%- endfor %}{%- if add_generation_prompt %}{{- ']~b]assistant\n<think>\n' }}{%- endif %}""",
    ("]~b]", *_THINK, "<minimax:tool_call>", "</minimax:tool_call>"), "[e~[", written=True,
)  # fmt: skip
GEMMA = Family(
    "gemma-4",
    """{%- macro visible(text) %}{%- for part in text.split('<channel|>') %}{{- part.split('<|channel>')[0] }}{%- endfor %}{%- endmacro %}{%- macro value(v) %}{%- if v is string %}{{- '<|"|>' + v + '<|"|>' }}{%- elif v is mapping %}{{- '{' }}{%- for k, x in v|items %}{{- (',' if not loop.first else '') + k + ':' }}{{- value(x) }}{%- endfor %}{{- '}' }}{%- elif v is sequence %}{{- '[' }}{%- for x in v %}{{- ',' if not loop.first else '' }}{{- value(x) }}{%- endfor %}{{- ']' }}{%- else %}{{- v|tojson }}{%- endif %}{%- endmacro %}{{- '<bos>' }}{%- for m in messages %}{{- '<|turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}{%- if m.reasoning_content %}{{- '<|channel>thought\n' + m.reasoning_content + '<channel|>' }}{%- endif %}{{- visible(m.content) if m.role == 'assistant' else m.content }}{%- for c in m.tool_calls or [] %}{{- '<|tool_call>call:' + c.function.name + '{' }}{%- for k, v in c.function.arguments|items %}{{- (',' if not loop.first else '') + k + ':' }}{{- value(v) }}{%- endfor %}{{- '}<tool_call|>' }}{%- endfor %}{{- '<turn|>\n' }}{%- endfor %}{%- if add_generation_prompt %}{{- '<|turn>model\n' }}{%- endif %}""",
    ("<bos>", "<|turn>", "<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", '<|"|>'), "<turn|>",
)  # fmt: skip

FAMILIES = (
    QWEN3_5, QWEN3_CODER, QWEN3_NEXT, GLM, KIMI, DEEPSEEK, GPT_OSS, MISTRAL, MINIMAX, GEMMA,
)  # fmt: skip

TOOL = {
    "type": "function",
    "function": {
        "name": "write_file",
        "description": "Write.",
        "parameters": {
            "type": "object",
            "properties": {
                "path": {"type": "string"}, "content": {"type": "string"}, "count": {"type": "integer"},
                "deep": {"anyOf": [{"type": "boolean"}, {"type": "null"}]},
                "lines": {"type": "array"}, "options": {"type": "object"},
            },
        },
    },
}  # fmt: skip


def encoded(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a text, markers as tokens."""
    return list(tokenizer.encode(text, add_special_tokens=False))


def read(
    tokenizer: Any,
    said: str | Sequence[int],
    prompt: str | Sequence[int] = (),
    tools: Any = (TOOL,),
    *,
    reason: str = "stop",
) -> list[Piece]:
    """Read an answer, and join neighbouring parts of the same kind."""
    tokens = encoded(tokenizer, said) if isinstance(said, str) else list(said)
    before = encoded(tokenizer, prompt) if isinstance(prompt, str) else list(prompt)
    reader = AnswerReader(tokenizer, before, list(tools) or None)
    if reason == "stop":
        tokens.append(tokenizer.eos_token_id)
    pieces: list[Piece] = []
    for i, token in enumerate(tokens):
        pieces += reader.feed(token, reason if i == len(tokens) - 1 else None)
    return joined(pieces)


def joined(pieces: Sequence[Piece]) -> list[Piece]:
    """Pieces with neighbouring parts of one kind joined."""
    result: list[Piece] = []
    for piece in pieces:
        last = result[-1] if result else None
        if isinstance(piece, Part) and isinstance(last, Part) and last.kind == piece.kind:
            result[-1] = Part(piece.kind, last.text + piece.text)
        else:
            result.append(piece)
    return result
