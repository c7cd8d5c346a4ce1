"""The dialect's rules that compilers let through, checked on the text. kernels/README.md says why each is there."""

import re

from flash_moe_mlx.ops.gpu.kernel_source import BODY_MARKER, strip_comments

PROSE = ("Math", "Inputs", "Outputs", "Shapes", "Threads", "Traffic", "Fused", "Assumes")
MAX_COLUMNS = 120

FORBIDDEN = {
    r"\bdouble\b": "double does not exist in Metal",
    r"\bgoto\b": "goto does not exist in Metal",
    r"\b(?:u?int|float|half)[234]\s*\((?!&)": "vector constructors differ: assign the members",
    r"\bas_type\b|\bas_\w+\(|\breinterpret_cast\b|\b__\w+": "bit casts and intrinsics belong to the dialect headers",
    r"(?<![\w.])\d+\.\d*(?:e[+-]?\d+)?(?![\d.]*f)\b": "a literal without f is a double",
    r"(?<!metal::)\b(?:exp|log|sqrt|fma|abs|fabs|min|max|fmin|fmax|pow)\s*\(": "maths is metal::name",
    r"\b(?:threadIdx|blockIdx|blockDim|get_\w+_id|cooperative_groups)\b": "names of one backend",
    r"\bprintf\b|\bassert\b": "not in Metal",
}  # fmt: skip
EARLY_RETURN = "an early return leaves lanes out of a barrier or a SIMD operation: predicate the stores"
TYPES = r"(?:float4?|u?int[24]?|uint32_t|uint16_t|bool|X|S|OUT|\w+_S|\w+_B|FmRows<[^>]*>)"
ANY_POINTER = re.compile(rf"(?<![\w:<]){TYPES}\s*(?:[*&](?!&)|\(&)")
ADDRESS_SPACES = {"device", "constant", "threadgroup", "thread"}
ATTRIBUTES = (
    "dispatch_quadgroups_per_threadgroup", "dispatch_simdgroups_per_threadgroup", "dispatch_threads_per_threadgroup",
    "grid_origin", "grid_size", "quadgroup_index_in_threadgroup", "quadgroups_per_threadgroup",
    "simdgroup_index_in_threadgroup", "simdgroups_per_threadgroup", "thread_execution_width",
    "thread_index_in_quadgroup", "thread_index_in_simdgroup", "thread_index_in_threadgroup", "thread_position_in_grid",
    "thread_position_in_threadgroup", "threadgroup_position_in_grid", "threadgroups_per_grid", "threads_per_grid",
    "threads_per_simdgroup", "threads_per_threadgroup",
)  # fmt: skip
"""Substrings that MLX searches the body for and adds to the signature."""

ALLOWED_ATTRIBUTES = {
    "simdgroup_index_in_threadgroup", "thread_index_in_simdgroup", "thread_index_in_threadgroup",
    "thread_position_in_grid", "threadgroup_position_in_grid",
}  # fmt: skip
"""Those that every dialect header has."""


def unqualified_pointers(text: str) -> list[str]:
    """Pointers and references whose address space is not written in front of their type."""
    found = []
    for match in ANY_POINTER.finditer(text):
        before = re.findall(r"\w+", text[: match.start()])
        if not before or before[-1] not in ADDRESS_SPACES:
            found.append(text[max(0, match.start() - 20) : match.end() + 20].replace("\n", " "))
    return found


def lint_code(text: str) -> list[str]:
    """Faults of code without comments: helpers or body."""
    faults = [f"{reason}: {match[0]!r}" for rule, reason in FORBIDDEN.items() for match in re.finditer(rule, text)]
    return faults + [f"pointer without an address space: {where!r}" for where in unqualified_pointers(text)]


def lint_body(body: str, inputs: tuple[str, ...]) -> list[str]:
    """Faults of a body: those of code, and what MLX's search for names would trip over."""
    faults = lint_code(body)
    if re.search(r"\breturn\b", body):
        faults.append(EARLY_RETURN)
    for name in inputs:
        for suffix in ("_shape", "_strides", "_ndim"):
            if len(re.findall(f"{name}{suffix}", body)) != len(re.findall(rf"\b{name}{suffix}\b", body)):
                faults.append(f"MLX would find {name}{suffix} inside another name")
    for attribute in ATTRIBUTES:
        if attribute in body and attribute not in ALLOWED_ATTRIBUTES:
            faults.append(f"no dialect header has {attribute}")
        elif len(re.findall(attribute, body)) != len(re.findall(rf"\b{attribute}\b", body)):
            faults.append(f"MLX would find {attribute} inside another name")
    return faults


def lint_file(name: str, text: str, inputs: tuple[str, ...]) -> list[str]:
    """Faults of a whole .metal file."""
    faults = [] if text.isascii() else ["not ASCII: Metal's compiler refuses it"]
    faults += [
        f"line {number} is longer than {MAX_COLUMNS}"
        for number, line in enumerate(text.splitlines(), 1)
        if len(line) > MAX_COLUMNS
    ]
    prose, marker, body = text.partition(BODY_MARKER + "\n")
    if not marker:
        return [*faults, f"no line {BODY_MARKER!r}"]
    if not prose.startswith(f"// {name}.metal: "):
        faults.append(f"must start with // {name}.metal: and what it does")
    faults += [f"no {word} line" for word in PROSE if not re.search(rf"^// {word} +\S", prose, re.MULTILINE)]
    return faults + lint_body(strip_comments(body), inputs)
