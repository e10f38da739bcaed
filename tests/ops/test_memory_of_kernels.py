"""Arrays that kernels make live for as long as their addresses are in use."""

import ast
from pathlib import Path

from rankgate.ops import cpu

FUNCTIONS = {
    (path.stem, node.name): node
    for path in sorted(Path(cpu.__file__).parent.glob("*.py"))
    for node in ast.walk(ast.parse(path.read_text()))
    if isinstance(node, ast.FunctionDef)
}


def _given(function: ast.FunctionDef, to: str) -> set[str]:
    """What calls in a function pass `to` another one."""
    calls = [node for node in ast.walk(function) if isinstance(node, ast.Call) and ast.unparse(node.func) == to]
    return {ast.unparse(argument) for call in calls for argument in call.args}


def test_whose_address_is_taken_is_kept():
    used = {name: found for name, f in FUNCTIONS.items() if (found := _given(f, "address_of"))}
    assert len(used) > 4
    assert used == {name: _given(FUNCTIONS[name], "keep") for name in used}


def test_no_compiled_function_takes_an_address_otherwise():
    compiled = {name: f for name, f in FUNCTIONS.items() if {"jit", "Kernel"} & {*map(ast.unparse, f.decorator_list)}}
    assert len(compiled) > 50
    assert [name for name, f in compiled.items() if "ctypes" in ast.unparse(f)] == [("compile", "address_of")]
