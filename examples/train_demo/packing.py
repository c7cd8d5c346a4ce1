"""Training rows: whole conversations packed into rows, made by other processes while the GPU works."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from data import MIX, conversations
from vocabulary import load_tokenizer

PAD = 0  # <|endoftext|>
OPEN_ROWS = 16  # rows that a worker fills at the same time
CONV_TAPS = 3  # a document's first tokens see at most this many tokens before it
CONVERSATIONS_A_JOB = 3000
JOBS_AHEAD = 3  # for each worker


def label_mask(ids: np.ndarray, answer_start: list[int]) -> np.ndarray:
    """Mark the tokens that the model learns to write: every assistant turn with its end token.

    Args:
        ids: Tokens of one conversation.
        answer_start: Tokens that open an assistant turn; the first is ``<|im_start|>``, an answer ends at id 2.
    """
    mask = np.zeros(len(ids), dtype=bool)
    width = len(answer_start)
    for start in np.flatnonzero(ids == answer_start[0]):
        if ids[start : start + width].tolist() == answer_start:
            end = start + width + int(np.argmax(ids[start + width :] == 2))
            mask[start + width : end + 1] = True
    return mask


def pack_rows(job: tuple[int, int, int, str, float]) -> np.ndarray:
    """Pack the conversations of one seed into rows of whole documents.

    Args:
        job: Seed, number of conversations, tokens per row, tokenizer's folder, weight of conversations with tools.

    Returns:
        int16 array (3, rows, tokens): ids, 1 where the token is learnt, position within its document.
    """
    seed, count, width, folder, tools = job
    tokenizer = load_tokenizer(Path(folder))
    opening = tokenizer.encode("<|im_start|>assistant\n", add_special_tokens=False)
    full: list[np.ndarray] = []
    filling: list[tuple[int, np.ndarray]] = []
    for example in conversations("train", seed, count, {**MIX, "tools": tools}):
        if example.raw:
            prompt = tokenizer.encode(example.prompt(tokenizer), add_special_tokens=False)
            answer = tokenizer.encode(example.answer, add_special_tokens=False)
            ids = np.array(prompt + answer + [2], dtype=np.int16)
            learnt = np.arange(len(ids)) >= len(prompt)
        else:
            ids = np.array(tokenizer.encode(example.text(tokenizer), add_special_tokens=False), dtype=np.int16)
            learnt = label_mask(ids, opening)
        length = len(ids) + CONV_TAPS
        if length > width:
            continue
        slot = next((i for i, (used, _) in enumerate(filling) if used + length <= width), None)
        if slot is None:
            if len(filling) == OPEN_ROWS:
                full.append(filling.pop(max(range(OPEN_ROWS), key=lambda i: filling[i][0]))[1])
            filling.append((0, np.stack([np.full(width, PAD), np.zeros(width), np.arange(width)]).astype(np.int16)))
            slot = -1
        used, row = filling[slot]
        row[0, used : used + len(ids)], row[1, used : used + len(ids)] = ids, learnt
        row[2, used:] = np.arange(width - used)
        filling[slot] = (used + length, row)
    return np.stack(full + [row for _, row in filling], axis=1)


def batches(
    seed: int, rows: int, width: int, tokenizer_folder: str, tools: float, workers: int
) -> Iterator[np.ndarray]:
    """Yield rows for training steps without end, none twice, whatever the number of workers.

    Yields:
        int16 arrays (3, rows, width), as ``pack_rows`` returns them.
    """
    left: list[np.ndarray] = []
    with get_context("spawn").Pool(workers) as pool:
        jobs: deque = deque()
        for number in range(seed * 100_000, (seed + 1) * 100_000):
            job = (number, CONVERSATIONS_A_JOB, width, tokenizer_folder, tools)
            jobs.append(pool.apply_async(pack_rows, (job,)))
            if len(jobs) < JOBS_AHEAD * workers:
                continue
            made = np.concatenate([*left, jobs.popleft().get()], axis=1)
            whole = made.shape[1] // rows
            for step in range(whole):
                yield made[:, step * rows : (step + 1) * rows]
            left = [made[:, whole * rows :]]
