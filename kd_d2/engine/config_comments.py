"""Comments above config keys, read from the functions that declare the keys.

yacs knows names and values only; what a key means stands above its line in ``config.py``.
"""

import ast
import inspect
import io
import textwrap
import tokenize
from typing import Callable, Dict, Iterable, Optional

__all__ = ["declared_comments"]


def declared_comments(functions: Iterable[Callable]) -> Dict[str, str]:
    """Return dotted key -> the comment above it (or behind it on its line).

    It is one paragraph, but for lines that are indented behind their "#": they stay lines.

    Understood are assignments to attributes of the first argument and of names that stand for a
    node (``cfg.KD.X = node = CN()``, ``node.KEY = 1``), dict literals given to a node
    (``cfg.KD.X = CN({"KEY": 1})``), and calls of functions that get a node as first argument. A
    key that is declared in another way, or whose source cannot be read, has no entry.

    Args:
        functions: ``add_xyz_config(cfg)``, as in ``CONFIG_NODES``.
    """
    result: Dict[str, str] = {}
    for function in functions:
        _Reader(function, "", result).read()
    return {key: comment for key, comment in result.items() if comment}


class _Reader:
    """Reads one function; ``prefix`` is the node that its first argument stands for."""

    def __init__(self, function: Callable, prefix: str, result: Dict[str, str], depth: int = 0):
        self._function, self._result, self._depth = function, result, depth
        self._nodes: Dict[str, str] = {}
        self._prefix = prefix

    def read(self) -> None:
        try:
            source = textwrap.dedent(inspect.getsource(self._function))
            tree = ast.parse(source).body[0]
            tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
        except (OSError, TypeError, SyntaxError, IndexError, tokenize.TokenError):
            return
        if not isinstance(tree, ast.FunctionDef) or not tree.args.args:
            return
        self._comments = {t.start[0]: t for t in tokens if t.type == tokenize.COMMENT}
        self._nodes[tree.args.args[0].arg] = self._prefix
        for statement in ast.walk(tree):
            if isinstance(statement, ast.Assign):
                self._assignment(statement)
            elif isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
                self._call(statement.value)

    def _assignment(self, statement: ast.Assign) -> None:
        attributes = [t for t in statement.targets if isinstance(t, ast.Attribute)]
        path = next(filter(None, map(self._path, [*attributes, statement.value])), None)
        if path is None:
            return
        for target in statement.targets:
            if isinstance(target, ast.Name):
                self._nodes[target.id] = path
        if attributes:
            self._result[path] = self._comment(statement)
            self._dict_keys(statement.value, path)

    def _dict_keys(self, value: ast.expr, path: str) -> None:
        """Keys of ``{...}`` or ``CN({...})``."""
        if isinstance(value, ast.Call) and len(value.args) == 1:
            value = value.args[0]
        if isinstance(value, ast.Dict):
            for key, item in zip(value.keys, value.values):
                if isinstance(key, ast.Constant):
                    self._result[f"{path}.{key.value}"] = self._comment(key, item)
                    self._dict_keys(item, f"{path}.{key.value}")

    def _call(self, call: ast.Call) -> None:
        """Follow ``add_schedule_config(node)``."""
        function = call.func.id if isinstance(call.func, ast.Name) else None
        called = getattr(self._function, "__globals__", {}).get(function)
        path = self._path(call.args[0]) if call.args else None
        if inspect.isfunction(called) and path is not None and self._depth < 5:
            _Reader(called, path, self._result, self._depth + 1).read()

    def _path(self, expression: ast.expr) -> Optional[str]:
        """Dotted config key that an expression stands for; None: not a node."""
        if isinstance(expression, ast.Name):
            return self._nodes.get(expression.id)
        if isinstance(expression, ast.Attribute):
            above = self._path(expression.value)
            return None if above is None else f"{above}.{expression.attr}".lstrip(".")
        return None

    def _comment(self, first: ast.AST, last: Optional[ast.AST] = None) -> str:
        behind = self._comments.get((last or first).end_lineno)
        if behind is not None and not self._alone(behind):
            return _paragraph([self._text(behind)])
        lines, line = [], first.lineno - 1
        while line in self._comments and self._alone(self._comments[line]):
            lines.insert(0, self._text(self._comments[line]))
            line -= 1
        return _paragraph(lines)

    @staticmethod
    def _alone(comment: tokenize.TokenInfo) -> bool:
        return not comment.line[: comment.start[1]].strip()

    @staticmethod
    def _text(comment: tokenize.TokenInfo) -> str:
        return comment.string.lstrip("#")


def _paragraph(lines: Iterable[str]) -> str:
    """Join lines with blanks, but keep indented ones (two blanks or more) as lines."""
    result, after_indented = "", False
    for line in lines:
        indented = line.startswith("  ")
        gap = "\n" if result and (indented or after_indented) else " "
        result += gap + ("  " if indented else "") + line.strip()
        after_indented = indented
    return result.strip()
