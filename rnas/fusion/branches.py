"""Whether the code of a function takes another way for other images: by their size, dtype, values, or PyTorch's state.

Such a function cannot be known from a few images.
"""

from __future__ import annotations

import ast
import dis
import functools
import inspect
import textwrap

_STATE = {"is_grad_enabled", "is_autocast_enabled", "is_inference_mode_enabled", "get_default_dtype", "is_compiling"}
"""Functions of PyTorch whose result is not the function's own."""


@functools.lru_cache(maxsize=1024)
def decides_by_input(function) -> bool:
    """Whether a condition or a loop depends on the first argument behind `self`, or on PyTorch's state.

    Code whose source is not to be had must not jump at all.
    """
    tree = _source(function)
    if tree is None:
        jumps = ("POP_JUMP", "JUMP_IF", "FOR_ITER")
        return any(each.opname.startswith(jumps) for each in dis.get_instructions(function.__code__))
    names = function.__code__.co_varnames
    first = names[1] if names[:1] == ("self",) and len(names) > 1 else names[0] if names else ""
    tainted = _tainted(tree, {first})
    return any(_reads(test, tainted) for node in ast.walk(tree) for test in _tests(node))


def _source(function) -> ast.AST | None:
    """The parsed source of a function; None where it is not to be had, or is that of other code by now."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return None
    names = {each.id for each in ast.walk(tree) if isinstance(each, ast.Name)}
    names |= {each.attr for each in ast.walk(tree) if isinstance(each, ast.Attribute)}
    code, (definition, *_) = function.__code__, tree.body
    same = isinstance(definition, ast.FunctionDef) and definition.name == code.co_name
    return tree if same and set(code.co_names) <= names | {definition.name} else None


def _tainted(tree: ast.AST, tainted: set[str]) -> set[str]:
    """The variables into which something of the tainted ones goes, in any order of the statements.

    What a call makes of images is images again: only their size, and what is read off them, decides anything.
    """
    while True:
        before = len(tainted)
        for node in ast.walk(tree):
            if isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.NamedExpr)) and node.value is not None:
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                if _reads(node.value, tainted):
                    tainted |= {name.id for each in targets for name in ast.walk(each) if isinstance(name, ast.Name)}
        if len(tainted) == before:
            return tainted


def _tests(node: ast.AST) -> list[ast.AST]:
    """What decides in a statement or an expression."""
    if isinstance(node, (ast.If, ast.While, ast.IfExp, ast.Assert)):
        return [node.test]
    if isinstance(node, ast.BoolOp):
        return node.values[:-1]
    if isinstance(node, (ast.For, ast.comprehension)):
        return [node.iter, *getattr(node, "ifs", [])]
    if isinstance(node, ast.Match):
        return [node.subject]
    return [node] if isinstance(node, ast.Try) else []


def _reads(node: ast.AST, tainted: set[str]) -> bool:
    """Whether an expression reads a tainted variable or PyTorch's state."""
    for each in ast.walk(node):
        if isinstance(each, ast.Name) and each.id in tainted:
            return True
        if isinstance(each, ast.Attribute) and each.attr in _STATE:
            return True
    return False
