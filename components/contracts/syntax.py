"""What a Python file does and what it imports, read from its syntax: the same in Python 3.11 to 3.13.

Comments, positions, and strings that stand by themselves say nothing here. Docstrings are the latter. Python and
pydantic keep some of them at run time (`__doc__`, descriptions of a `Section`'s fields), but no step reads one (a
test), and the command line, whose help they are, makes no step's output.
"""

from __future__ import annotations

import ast
import hashlib
import re
from dataclasses import dataclass, field
from typing import Any

_OURS = re.compile(r"(nvila(?:\.[A-Za-z_]\w*)+)(\.|:\w*)?")
"""A string that names one of our modules, or something in it: `-m nvila...`, an entry point `nvila...:Name`; or that
begins such a name, as `f"nvila.components.data.demo.{name}"` does."""
_SAY_NOTHING = {"ctx", "kind", "type_comment", "type_ignores"}
"""Fields that repeat where a name stands, or how a string was written."""


@dataclass(frozen=True)
class Syntax:
    """A file's content as a step has it."""

    sha256: str
    imported: tuple[str, ...]
    """Dotted names, sorted: of modules, and of what is taken from them, which may be modules too, or `*`. Those that
    are named from where the file lies begin with a dot."""


def read_syntax(source: bytes, where: str = "<unknown>") -> Syntax:
    """Parse a file; imports inside functions count, those `if TYPE_CHECKING` are never executed and do not."""
    walk = _Walk()
    walk.through(ast.parse(source, filename=where))
    return Syntax(hashlib.sha256("\n".join(walk.said).encode()).hexdigest(), tuple(sorted(walk.imported)))


@dataclass
class _Walk:
    """An own walk, since `ast.dump` says something else in each version of Python. Empty fields are left out, and so
    those that a later version has added are."""

    said: list[str] = field(default_factory=list)
    imported: set[str] = field(default_factory=set)

    def through(self, node: Any) -> None:
        if isinstance(node, list):
            self.said.append("[")
            for item in node:
                self.through(item)
            self.said.append("]")
        elif isinstance(node, ast.Constant):
            self._constant(node.value)
        elif isinstance(node, ast.AST):
            self._node(node)
        else:  # a name, or None in a list: a keyword-only argument without a default
            self.said.append(ascii(node))

    def _node(self, node: ast.AST) -> None:
        self.said.append(f"({type(node).__name__}")
        if isinstance(node, ast.Import):
            self.imported.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            of = "." * node.level + (node.module or "")
            self.imported |= {of, *(f"{of}{'.' if node.module else ''}{alias.name}" for alias in node.names)}
        for name in node._fields:
            value = getattr(node, name, None)
            if isinstance(value, list):
                value = [item for item in value if not _says_nothing(item, node)]
            if value is None or value == [] or name in _SAY_NOTHING:
                continue
            self.said.append(name)
            self.through(value)
        self.said.append(")")

    def _constant(self, value: object) -> None:
        if isinstance(value, str) and (named := _OURS.fullmatch(value)):
            self.imported.add(named[1] + (".*" if named[2] == "." else ""))
        # Not `repr`: which characters it shows as they are depends on the version's Unicode.
        self.said += (type(value).__name__, ascii(value))


def _says_nothing(item: Any, of: ast.AST) -> bool:
    if isinstance(item, ast.If):
        return isinstance(item.test, ast.Name) and item.test.id == "TYPE_CHECKING" and not item.orelse
    if isinstance(of, ast.JoinedStr):  # Python 3.12 ends a format with an empty string
        return isinstance(item, ast.Constant) and item.value == ""
    return isinstance(item, ast.Expr) and isinstance(item.value, ast.Constant) and isinstance(item.value.value, str)
