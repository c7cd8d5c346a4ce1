"""Random changes of a checkpoint's JSON files and tensor headers, each loaded here: nothing untyped may come out.

Run as a script it is a child whose address space is bounded, so that a value which asks for more memory than any limit
ends in an exception that is reported: ``python -m tests.support.mutations DIRECTORY SEED COUNT SCRATCH [headers]``.
"""

import json
import random
import resource
import shutil
import signal
import sys
import traceback
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOM_BYTES = 3 << 30  # beyond what the process has mapped when it begins
LIMIT = 200_000_000
SECONDS = 20  # of the processor, so that a busy machine fails nothing
DEEP: Any = 1
for _ in range(900):
    DEEP = [DEEP]
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, 2, 3, -1, 7, 255, 256, 1000, 2**15, 2**31 - 1, 2**31, 2**40, 2**63, 10**30, -(2**63),
    0.0, 0.5, 1.5, -1.5, 1e-300, 1e300, float("nan"), float("inf"), "", "x", "base", "../..", "\ud800", "\x00", "0",
    "é" * 500, [], [0], [1, 2], ["x"], [[]], [None], {}, {"a": 1}, {"": []}, {"type": "yarn"}, DEEP, {"a": DEEP},
    {"__float__": "NaN"}, {"__float__": []}, {"bits": 4, "group_size": 64},
    {"bits": 4, "group_size": 32, "mode": "mxfp4"}, {"bits": 4, "group_size": 16, "mode": "nvfp4"},
    {"bits": 8, "group_size": 128, "mode": "fp8"}, {"bits": 4, "mode": "int4"}, {"quant_method": "mxfp4"},
    {"quant_method": "compressed-tensors", "format": "pack-quantized"}, {"quant_method": "fp8"}, {"quant_method": []},
    {"quant_method": "awq", "bits": 4, "group_size": 32}, {"quant_method": "awq", "version": {}},
    {"quant_method": "gptq"}, {"quant_method": "gptq", "bits": 8, "group_size": 32},
    {"quant_method": "gptq", "checkpoint_format": []},
    {"bits": 8, "group_size": 32, "mode": "mxfp8"}, {"quant_method": "mxfp8"}, {"quant_method": "compressed-tensors"},
    {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"},
    {"quant_method": "modelopt", "quant_algo": "NVFP4"}, {"quant_method": "modelopt", "quantization": []},
    "yarn", "linear", "full_attention", "qwen3_moe", "deepseek_v3", "affine", "model-00001-of-00003.safetensors",
)  # fmt: skip


PARTS = (
    "weight", "scales", "biases", "bias", "global_scale", "weight_scale", "weight_scale_2", "weight_scale_inv", "x",
    "weight_global_scale", "weight_packed", "weight_shape", "input_scale", "qweight", "qzeros", "g_idx", "gate_up_proj",
    "gate_up_proj_blocks", "gate_up_proj_scales", "gate_up_proj_bias", "down_proj", "down_proj_blocks",
)  # fmt: skip
DTYPES = (("U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "BOOL"), ("BF16", "F16", "U16", "I16"), ("F32", "U32", "I32"))


class TooSlow(BaseException):
    """Nothing may take this long on a model of a megabyte."""


def mutate(data: bytes, rng: random.Random) -> bytes:
    """A JSON file's text with one change, of its values mostly."""
    if rng.random() < 0.1:
        return _mutate_bytes(data, rng)
    value = json.loads(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        value = _mutate_value(value, rng)
    try:
        return json.dumps(value).encode()
    except RecursionError:  # deep in deep
        return b"[" * 5000


def mutate_header(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file with one to three changes of its header, mostly of all tensors of a kind at once."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    for _ in range(rng.choice((1, 1, 2, 3))):
        names = [name for name in header if name != "__metadata__"]
        if not names:
            break
        one = rng.choice(names).split(".")
        kinds = [[".".join(one)], *([n for n in names if n.split(".")[-k:] == one[-k:]] for k in (1, 1, 2))]
        _mutate_tensors(header, rng.choice(kinds), rng)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def _mutate_tensors(header: dict[str, Any], names: list[str], rng: random.Random) -> None:
    """Change some tensors in the same way: where bytes allow, so that later checks are reached."""
    change, part, axis = rng.randrange(7), rng.choice(PARTS), rng.randrange(4)
    number, value = rng.choice(("0", "1", "2", "15", "16", "00", "9999999")), rng.choice((0, 1, 2, 3, 32, 128, 2**40))
    for name in names:
        entry = header[name]
        shape, stem = entry["shape"], name.rpartition(".")[0]
        match change:
            case 0:
                del header[name]
            case 1:
                header[f"{stem}.{part}"] = header.pop(name)
            case 2:
                header[f"{stem}.{part}"] = dict(entry)
            case 3:
                alike = next((some for some in DTYPES if entry["dtype"] in some), ("F64",))
                entry["dtype"] = alike[axis % len(alike)] if value else "F4"
            case 4 if shape:
                at = axis % len(shape)
                shape[at : at + 1] = [shape[at] // 2, 2] if value % 2 else [1, shape[at]]
            case 5 if len(shape) > 1:
                shape[:] = shape[::-1] if value % 2 else [shape[0] * shape[1], *shape[2:]]
            case 6 if axis and shape:
                shape[axis % len(shape)] = value
            case _:
                header[".".join(number if word.isdigit() else word for word in name.split("."))] = header.pop(name)


def _any(rng: random.Random) -> Any:
    return json.loads(json.dumps(rng.choice(VALUES)))  # a copy: it may be changed in turn


def _mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    match rng.randrange(5):
        case 0:
            return data[:at]
        case 1:
            return data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
        case 2:
            return data[:at] + data[at + rng.randrange(1, 9) :]
        case 3:
            return data[:at] + rng.choice((b"\xff", b"NaN", b"{", b"]", b"9" * 5000, b"1e999")) + data[at:]
        case _:
            return rng.choice((b"", b"null", b"[]", b"{}", b"0", b'"x"', b"\xef\xbb\xbf" + data))


def _mutate_value(value: Any, rng: random.Random) -> Any:
    places = [(outer, key) for outer, key in _places(value) if not isinstance(outer, dict) or len(outer) < 200]
    big = [(outer, key) for outer, key in _places(value) if isinstance(outer, dict) and len(outer) >= 200]
    places += rng.sample(big, min(len(big), 20))  # vocabularies must not drown the rest
    if not places:
        return _any(rng)
    outer, key = rng.choice(places)
    match rng.randrange(8):
        case 0:
            del outer[key]
        case 1 if isinstance(outer, dict):
            outer[rng.choice(("x", "num_layers", "type", "factor", "layer_types", "bits", "id"))] = _any(rng)
        case 2 if isinstance(outer, list):
            outer.insert(rng.randrange(len(outer) + 1), _any(rng))
        case 3:
            outer[key] = [outer[key]]
        case 4 if isinstance(outer[key], int | float) and not isinstance(outer[key], bool):
            outer[key] = rng.choice((-outer[key], outer[key] * 2, outer[key] + 1, outer[key] - 1, outer[key] * 2**20))
        case _:
            outer[key] = _any(rng)
    return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    level = [value]
    while level:
        outer = level.pop()
        keys = list(outer) if isinstance(outer, dict) else range(len(outer)) if isinstance(outer, list) else ()
        for key in keys:
            yield outer, key
            if isinstance(outer[key], dict | list):
                level.append(outer[key])


def with_checksum(data: bytes) -> bytes:
    """A manifest's bytes with the checksum that they ought to end with, so that what follows it is reached."""
    try:
        value = json.loads(data)
        value.pop("manifest_crc32", None)
        text = json.dumps(value, indent=1).removesuffix("\n}").encode()
    except (ValueError, AttributeError, RecursionError, TypeError):
        return data
    return text + f',\n "manifest_crc32": "{zlib.crc32(text):08x}"\n}}\n'.encode()


@contextmanager
def _time_limit() -> Iterator[None]:
    def ring(*_: object) -> None:
        raise TooSlow

    signal.signal(signal.SIGPROF, ring)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def attempt(directory: Path) -> str:
    """Load, use and close what is in a directory, packed first if that is what loading says; how it ended."""
    import mlx.core as mx

    from flash_moe_mlx import FlashMoEError, UnsupportedModelError, load, load_model, pack

    before = mx.get_active_memory()
    mx.reset_peak_memory()
    try:
        with _time_limit():
            tokenizer: Any = None
            if (directory / "tokenizer.json").exists():
                model, tokenizer = load(directory, memory_limit=LIMIT, max_context=64)  # type: ignore[misc]
            else:
                try:
                    model = load_model(directory, memory_limit=LIMIT, max_context=64)
                except UnsupportedModelError as error:
                    if "--bits unchanged" not in str(error):
                        raise
                    packed = directory.with_name("packed")
                    shutil.rmtree(packed, ignore_errors=True)
                    pack(directory, packed, bits=None, progress=False)
                    model = load_model(packed, memory_limit=LIMIT, max_context=64)
            with model.streaming:
                mx.eval(model(mx.array([[1, 2, 3]])))
                if tokenizer is not None:
                    ids = tokenizer.encode("Hello, you <|im_end|> é")
                    tokenizer.decode(ids)
                    for token in ids[:4]:
                        tokenizer.detokenizer.add_token(token)
        peak = mx.get_peak_memory() - before
        return "loaded" if peak <= LIMIT else f"PEAK {peak}"
    except FlashMoEError as error:
        peak = mx.get_peak_memory() - before
        return type(error).__name__ if peak <= LIMIT else f"PEAK {peak}"
    except (Exception, TooSlow) as error:  # noqa: BLE001  whatever it is, it is what is looked for
        where = traceback.extract_tb(error.__traceback__)
        lines = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(where[-4:]))
        return f"RAW {type(error).__name__}: {str(error)[:200]} ({lines})"


def run(source: Path, seed: int, count: int, work: Path, *, headers: bool) -> dict[str, Any]:
    """Mutate and load ``count`` times, with ``headers`` of shards too: numbers of outcomes, and what escaped."""
    rng = random.Random(seed)
    files = sorted(path for path in source.iterdir() if path.suffix == ".json")
    files += [path for path in files if path.name == "config.json"] * 2  # most is decided there
    if headers:
        files += [path for path in source.iterdir() if path.suffix == ".safetensors"] * 5
    outcomes: Counter[str] = Counter()
    escaped = []
    for number in range(count):
        path = rng.choice(files)
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        for other in source.iterdir():
            if other != path:
                (work / other.name).symlink_to(other)
        shard = path.suffix == ".safetensors"
        data = (mutate_header if shard else mutate)(path.read_bytes(), rng)
        if path.name == "experts.json" and rng.random() < 0.9:
            data = with_checksum(data)
        (work / path.name).write_bytes(data)
        outcome = attempt(work)
        outcomes[outcome.split()[0]] += 1
        if outcome.startswith(("RAW", "PEAK")):
            escaped.append(f"{number} {path.name}: {outcome}")
            escaped[-1] += "" if shard else repr(data[:4000])
    return {"outcomes": dict(outcomes), "escaped": escaped}


if __name__ == "__main__":
    import flash_moe_mlx.runtime.loading  # noqa: F401  what it maps is not counted

    attempt(Path(sys.argv[1]))
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM_BYTES,) * 2)
    print(
        json.dumps(
            run(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]), headers=len(sys.argv) > 5)
        )
    )
