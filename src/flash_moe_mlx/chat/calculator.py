"""The built-in tool: arithmetic, read as a syntax tree of which nothing but arithmetic is evaluated."""

import ast
import math
import operator
from collections.abc import Callable
from typing import Any

MAX_CHARACTERS = 1000
MAX_RESULT_BITS = 10_000  # of a power: larger ones would only take time

_OPERATORS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    name: getattr(math, name)
    for name in ("sqrt", "exp", "log", "log2", "log10", "sin", "cos", "tan", "asin", "acos", "atan", "floor", "ceil")
} | {"abs": abs, "round": round, "min": min, "max": max}
_CONSTANTS = {"pi": math.pi, "e": math.e, "tau": math.tau}


def calculate(expression: str) -> int | float:
    """Evaluate an arithmetic expression.

    Args:
        expression: Numbers, + - * / // % ** ^, parentheses, and functions such as sqrt, log, sin, round, min.
    """
    if len(expression) > MAX_CHARACTERS:
        raise ValueError(f"an expression must have at most {MAX_CHARACTERS} characters, got {len(expression)}")
    for sign, operation in (("×", "*"), ("÷", "/"), ("^", "**")):  # Python's ^ would bind less than a sum
        expression = expression.replace(sign, operation)
    tree = ast.parse(expression.strip(), mode="eval")
    value = _evaluate(tree.body)
    # 0.1 + 0.2 is 0.3 to people.
    return float(f"{value:.12g}") if isinstance(value, float) else value


def _evaluate(node: ast.expr) -> int | float:
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            return value
        case ast.Name(id=name) if name in _CONSTANTS:
            return _CONSTANTS[name]
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            return _power(_evaluate(left), _evaluate(right))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_evaluate(left), _evaluate(right))
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_evaluate(operand))
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in _FUNCTIONS:
            return _FUNCTIONS[name](*(_evaluate(argument) for argument in arguments))
    raise ValueError(f"an expression must be arithmetic, got {ast.unparse(node)!r}")


def _power(base: int | float, exponent: int | float) -> int | float:
    if isinstance(base, int) and isinstance(exponent, int) and base.bit_length() * abs(exponent) > MAX_RESULT_BITS:
        raise ValueError(f"{base} ** {exponent} is too large")
    value = base**exponent
    if isinstance(value, complex):
        raise ValueError(f"{base} ** {exponent} is not a real number")
    return value
