"""What the code of a module class does with the weights of its children besides calling them, found without running it.

For example ``x.to(self.linear.weight.dtype)`` in a `forward` reads the dtype of the weight at ``("linear", "weight")``.

The code is followed from `forward` on, through methods, helpers that are handed a module (attention processors, functions),
names, loops, and the results of `parameters()`. A child is known by its path of attribute names, with `*` for any entry of a
container. Running a model shows more (`methods.readers`), but a model that is being loaded cannot run.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from types import FunctionType
from typing import Any, Literal

from torch import nn

Path = tuple[str, ...]
Use = Literal["dtype unless int8", "dtype", "values"]

ANY, FIRST, ENTRY = "<any parameter>", "<first parameter>", "*"
HARMLESS = {"device", "requires_grad", "is_cuda", "is_meta", "grad", "is_leaf", "layout"}
_TRANSPARENT = {"iter", "list", "tuple", "reversed", "enumerate", "zip", "sorted"}
_PARAMETERS = {"parameters", "named_parameters"}
_CONTAINED = {"children", "named_children", "values", "items"}
# Classes whose methods are about modules as such: none of them computes anything of a forward pass with a weight.
_GENERAL = ("torch.nn.modules.module", "diffusers.models.modeling_utils", "transformers.modeling_utils")


@dataclass(frozen=True)
class Read:
    """One place in the code that reads a weight: the path of the weight from the module, and its use there."""

    path: Path
    use: Use


@dataclass(frozen=True)
class Code:
    """What one function does: the names of attributes that it mentions, and the weights that it reads."""

    mentions: frozenset[str]
    reads: frozenset[Read]


@cache
def code_of(cls: type, name: str, helper: bool = False) -> Code:
    """What a method does with the weights of the children of its object. Overridden methods count as well.

    Args:
        cls: The class of the object.
        name: The name of the method.
        helper: Whether the class is one whose calls are handed the module that owns it, as those of an attention processor.
    """
    bound = ((int(helper), ()),)
    codes = [_read_code(function, bound, cls, 0) for function in functions(cls).get(name, ())]
    mentions, reads = (code.mentions for code in codes), (code.reads for code in codes)
    return Code(frozenset().union(*mentions), frozenset().union(*reads))


@cache
def functions(cls: type) -> dict[str, tuple[FunctionType, ...]]:
    """The functions and properties of a class by name, its own before those of its bases. `_GENERAL` bases do not count."""
    found: dict[str, tuple[FunctionType, ...]] = {}
    for owner in cls.__mro__:
        if owner is object or owner.__module__ in _GENERAL:
            continue
        for name, value in vars(owner).items():
            function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
            function = inspect.unwrap(function) if callable(function) else function
            if isinstance(function, FunctionType):
                found[name] = (*found.get(name, ()), function)
    return found


def readable(cls: type[nn.Module]) -> bool:
    """Whether the source of a module class's `forward` is there."""
    forward: Any = cls.forward
    return _tree(forward) is not None


@cache
def _tree(function: FunctionType) -> ast.FunctionDef | None:
    try:
        found = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, TypeError, SyntaxError):  # built in, made at run time, a lambda in the middle of a line
        return None
    return found if isinstance(found, ast.FunctionDef) else None


@cache
def _read_code(
    function: FunctionType, bound: tuple[tuple[int, Path], ...], cls: type | None, depth: int
) -> Code:
    """What a function does when some of its positional arguments are the modules at these paths."""
    tree = _tree(function)
    if tree is None:
        return Code(frozenset(), frozenset())
    names = [argument.arg for argument in tree.args.posonlyargs + tree.args.args]
    start = {names[at]: {path} for at, path in bound if at < len(names)}
    return _Reader(tree, start, function, cls, depth).code()


class _Reader:
    """Follows modules through one function. The order of statements does not count: a name stands for all it is ever given."""

    def __init__(
        self,
        tree: ast.FunctionDef,
        start: dict[str, set[Path]],
        function: FunctionType,
        cls: type | None,
        depth: int,
    ) -> None:
        self.names = start
        self.function, self.cls, self.depth = function, cls, depth
        self.nodes = list(ast.walk(tree))
        self.above = {child: node for node in self.nodes for child in ast.iter_child_nodes(node)}
        self.mentions = frozenset(node.attr for node in self.nodes if isinstance(node, ast.Attribute))
        self.reads: set[Read] = set()
        self.guarded: set[Path] = set()

    def code(self) -> Code:
        for _ in range(3):  # names of names of names
            for node in self.nodes:
                self._bind(node)
        for node in self.nodes:  # where it asks for floating point, it knows that weights may be packed
            if isinstance(node, ast.Attribute) and _asks_floating(node):
                self.guarded |= {
                    path[:-1] if path[-1:] == ("dtype",) else path for path in self.value(node.value)
                }
        for node in self.nodes:
            if isinstance(node, ast.Attribute | ast.Name | ast.Call) and isinstance(
                getattr(node, "ctx", ast.Load()), ast.Load
            ):
                self._note(node)
                self._note_dtype(node)
            if isinstance(node, ast.Call):
                self._follow(node)
        return Code(self.mentions, frozenset(self.reads))

    def _bind(self, node: ast.AST) -> None:
        if isinstance(node, ast.Assign):
            for target in node.targets:
                self._give(target, self.value(node.value))
        elif isinstance(node, ast.NamedExpr | ast.AnnAssign) and node.value is not None:
            self._give(node.target, self.value(node.value))
        elif isinstance(node, ast.For | ast.comprehension):
            self._give(node.target, self._entries(node.iter))

    def _give(self, target: ast.expr, paths: set[Path]) -> None:
        for node in ast.walk(target):
            if isinstance(node, ast.Name) and paths:
                self.names.setdefault(node.id, set()).update(paths)

    def _entries(self, node: ast.expr, key: str = ENTRY) -> set[Path]:
        """The paths that an entry of this may have: an entry of a container, or, of a list, what the code put there."""
        paths = self.value(node)
        listed = isinstance(node, ast.Name | ast.Tuple | ast.List | ast.Call)
        return {_entry(path, key) for path in paths} | (paths if listed else set())

    def value(self, node: ast.expr) -> set[Path]:
        """The paths of the modules or parameters that an expression may be."""
        if isinstance(node, ast.Name):
            return self.names.get(node.id, set())
        if isinstance(node, ast.Attribute):
            base = self.value(node.value)
            return {(*path, node.attr) for path in base if node.attr == "dtype" or not _is_parameter(path)}
        if isinstance(node, ast.Subscript):
            key = node.slice.value if isinstance(node.slice, ast.Constant) else ENTRY
            return self._entries(node.value, str(key))
        if isinstance(node, ast.Call):
            return self._called(node)
        children = [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr)]
        if isinstance(node, ast.IfExp | ast.BoolOp | ast.NamedExpr | ast.Tuple | ast.List | ast.Starred):
            return set().union(*(self.value(child) for child in children))
        return set()

    def _called(self, node: ast.Call) -> set[Path]:
        function = node.func
        if isinstance(function, ast.Attribute):
            base = self.value(function.value)
            if function.attr == "chain":
                return set().union(*(self.value(argument) for argument in node.args))
            if function.attr in _PARAMETERS:
                return {(*path, ANY) for path in base}
            if function.attr == "modules" or function.attr == "named_modules":
                return {(*path, "**") for path in base}
            return {(*path, ENTRY) for path in base} if function.attr in _CONTAINED else set()
        if not isinstance(function, ast.Name) or not node.args:
            return set()
        first = self.value(node.args[0])
        if function.id == "next":
            return {(*path[:-1], FIRST) if path[-1:] == (ANY,) else _entry(path) for path in first}
        if function.id == "getattr" and len(node.args) > 1:
            key = node.args[1]
            name = str(key.value) if isinstance(key, ast.Constant) else ENTRY
            return {(*path, name) for path in first}
        if function.id in _TRANSPARENT:
            return set().union(*(self.value(argument) for argument in node.args))
        return set()

    def _note(self, node: ast.expr) -> None:
        """Keep the use of a weight, if the expression is one."""
        weights = {path for path in self.value(node) if _is_weight(path)}
        above = self.above.get(node)
        if not weights or isinstance(above, ast.Assign | ast.NamedExpr | ast.For | ast.comprehension):
            return  # the name it goes by is looked at wherever it is used
        if isinstance(above, ast.Compare):  # with None, or the name that `named_parameters` gives
            return
        if isinstance(above, ast.Call) and above.func is not node and self._passes(above):
            return
        if isinstance(above, ast.Attribute | ast.IfExp | ast.BoolOp) or isinstance(above, ast.Call):
            use = self._use(above)
        else:
            use = "values"
        if use is not None:
            self.reads |= {Read(path, use) for path in weights}

    def _passes(self, call: ast.Call) -> bool:
        """Whether a call only hands its argument on, or asks what it is."""
        name = getattr(call.func, "id", getattr(call.func, "attr", ""))
        return name in _TRANSPARENT | {"chain", "next", "isinstance", "hasattr", "id", "len"}

    def _use(self, above: ast.AST) -> Use | None:
        if isinstance(above, ast.IfExp | ast.BoolOp):
            return None if isinstance(self.above.get(above), ast.Assign) else "values"
        if not isinstance(above, ast.Attribute):
            return "values"
        return None if above.attr in HARMLESS | {"is_floating_point", "dtype"} else "values"

    def _note_dtype(self, node: ast.expr) -> None:
        """Keep the use of a weight's dtype, if the expression is one. Names are looked at wherever they are used."""
        paths = {path for path in self.value(node) if path[-1:] == ("dtype",) and _is_weight(path[:-1])}
        paths -= {(*path, "dtype") for path in self.guarded}
        inner: ast.AST = node
        outer = self.above.get(node)
        if not paths or isinstance(outer, ast.Assign | ast.NamedExpr):
            return
        use: Use = "dtype"
        while outer is not None:
            if isinstance(outer, ast.Compare) or _asks_floating(outer):
                return
            if (
                isinstance(outer, ast.If | ast.IfExp)
                and inner is not outer.test
                and self._excludes_int8(outer.test, paths)
            ):
                use = "dtype unless int8"
            inner, outer = outer, self.above.get(outer)
        self.reads |= {Read(path[:-1], use) for path in paths}

    def _excludes_int8(self, test: ast.expr, paths: set[Path]) -> bool:
        """Whether a condition compares these dtypes with int8."""
        return any(
            isinstance(node, ast.Compare)
            and any(getattr(side, "attr", "") == "int8" for side in ast.walk(node))
            and any(paths & self.value(side) for side in (node.left, *node.comparators))
            for node in ast.walk(test)
        )

    def _follow(self, node: ast.Call) -> None:
        """Look into a function or method that is handed a module."""
        # Deeper helpers than this do not occur in diffusers or transformers, and recursion must end.
        if self.depth > 2:
            return
        bound = [
            (at, path)
            for at, argument in enumerate(node.args)
            for path in self.value(argument)
            if path is not None
        ]
        if not bound:
            return
        for function, skipped in self._targets(node.func):
            for at, path in bound:
                if not isinstance(node.args[at], ast.Starred):
                    code = _read_code(function, ((at + skipped, path),), self.cls, self.depth + 1)
                    self.reads |= code.reads
                    self.mentions |= code.mentions

    def _targets(self, function: ast.expr) -> Iterator[tuple[FunctionType, int]]:
        if isinstance(function, ast.Name):
            found: Any = self.function.__globals__.get(function.id)
            found = inspect.unwrap(found) if isinstance(found, FunctionType) else found
            if isinstance(found, FunctionType) and not found.__module__.startswith("torch."):
                yield found, 0
        elif isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
            if function.value.id == "self" and self.cls is not None:
                yield from ((target, 1) for target in functions(self.cls).get(function.attr, ()))


def _entry(path: Path, key: str = ENTRY) -> Path:
    """The path of an entry of what is at `path`. Entries of a list of parameters are parameters."""
    return path if path[-1:] in ((ANY,), (FIRST,), ("**",)) else (*path, key)


def _asks_floating(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == "is_floating_point"


def _is_parameter(path: Path) -> bool:
    return path[-1:] in ((ANY,), (FIRST,))


def _is_weight(path: Path) -> bool:
    return _is_parameter(path) or (len(path) > 1 and path[-1] == "weight")


def reachable(owners: Sequence[tuple[type, bool]]) -> frozenset[str]:
    """The names of methods that can run when `forward` does, where every mentioned method counts as called.

    Args:
        owners: Classes, each with whether it is a helper in the sense of `code_of`.
    """
    todo, seen = {"forward", "__call__"}, set()
    while todo:
        name = todo.pop()
        seen.add(name)
        mentions = set().union(*(code_of(cls, name, helper).mentions for cls, helper in owners))
        todo |= {
            mention for mention in mentions - seen if any(mention in functions(cls) for cls, _ in owners)
        }
    return frozenset(seen)
