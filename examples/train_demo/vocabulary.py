"""The demo model's tokenizer: byte-level BPE in which words, single digits, spaces and JSON marks never share a token.

A word has the same tokens after a space and inside quotes, so that copying a value into a tool call is copying tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

HERE = Path(__file__).parent
SIZE = 2048
MAX_TOKENS = 2048
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MARKS = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<tools>", "</tools>"]
# Text that merges are learnt on: JSON marks with the spaces between them, a digit, a word, any other character.
LEARNING_PATTERN = r'["{}\[\],:]+(?: ["{}\[\],:]+)*|\p{N}|\p{L}+|[\s\S]'

# The pattern that splits text first in use. transformers puts this one on every qwen3_5_moe checkpoint, whatever its
# tokenizer.json says, so it has to be this one. No learnt merge crosses from a space or a mark into a word.
QWEN_PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def split_by(pattern: str) -> pre_tokenizers.PreTokenizer:
    """Split by a pattern, then into bytes."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Train on rendered conversations. The result does not depend on the order of equal counts: BPE breaks ties by id."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = split_by(LEARNING_PATTERN)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE,
        special_tokens=CONTROL + MARKS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.pre_tokenizer = split_by(QWEN_PATTERN)
    bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROL])
    bpe.add_tokens([AddedToken(token, special=False, normalized=False) for token in MARKS])
    return wrap(bpe)


def wrap(bpe: Tokenizer) -> PreTrainedTokenizerFast:
    """The tokenizer as transformers knows it, with its end token and chat template."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=MAX_TOKENS,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = (HERE / "chat_template.jinja").read_text()
    return tokenizer


def template_only() -> PreTrainedTokenizerFast:
    """A tokenizer with the chat template and no vocabulary: enough to render texts to train the real one on."""
    return wrap(Tokenizer(models.BPE()))


def load_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """Return the tokenizer saved with a checkpoint."""
    return AutoTokenizer.from_pretrained(str(path))
