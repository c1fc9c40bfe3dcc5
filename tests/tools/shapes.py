"""Check the shape comments of a module against the tensors that a run really makes.

A statement may end in a comment such as `# (B, L, H, D)`, `# 3 × (..., H, L, D)` or
`# (M, C), (M,)`. While a `Tracer` is active, the variables that such a statement assigns (or
the value that it returns) are compared with the comment as soon as the statement is done.

A letter stands for one of the sizes that the run names (`{"L": {13, 29}}`), and for the same
one throughout a call. A name that the run does not know stands for whatever it meets first.
"""

import ast
import io
import itertools
import re
import sys
import tokenize
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, ModuleType

import torch

Sizes = dict[str, set[int]]
_SHAPE = r"\((?:[^()]*)\)"
_COMMENT = re.compile(rf"#\s*((?:\d+\s*[×x]\s*)?{_SHAPE}(?:\s*,\s*{_SHAPE})*)(?=$|[\s:;.])")
_ANY = ("...", "…")


@dataclass(frozen=True)
class Claim:
    """What one comment says: for each value, its dimensions as expressions."""

    line: int
    end: int
    text: str
    shapes: tuple[tuple[str, ...], ...]  # one for each value
    targets: tuple[str, ...]  # expressions to look at when the statement is done; () at a return


@dataclass
class Tracer:
    """Watches modules while it is active (`with tracer.at({"B": {2}, …}): …`)."""

    modules: list[ModuleType]
    failures: list[str] = field(default_factory=list)
    reached: set[tuple[str, int]] = field(default_factory=set)
    sizes: Sizes = field(default_factory=dict)

    def __post_init__(self):
        self.claims = {
            m.__file__: claims(Path(m.__file__).read_text("utf-8")) for m in self.modules
        }
        self._calls: dict[FrameType, _Call] = {}

    def unreached(self) -> list[str]:
        """Comments that no run has checked so far."""
        return [
            f"{Path(file).name}:{claim.end}: {claim.text}"
            for file, known in self.claims.items()
            for claim in known
            if (file, claim.line) not in self.reached
        ]

    def at(self, sizes: Sizes) -> "Tracer":
        """Name the sizes of the run to come."""
        self.sizes = sizes
        return self

    def __enter__(self) -> "Tracer":
        self._before = sys.gettrace()
        sys.settrace(self._on_call)
        return self

    def __exit__(self, *exception) -> None:
        sys.settrace(self._before)

    def _on_call(self, frame: FrameType, event: str, argument: object):
        known = self.claims.get(frame.f_code.co_filename)
        # Comprehensions and lambdas have frames of their own, without the names of the statement.
        if known is None or frame.f_code.co_name.startswith("<"):
            return None
        self._calls[frame] = _Call(known, [{}])
        return self._on_line

    def _on_line(self, frame: FrameType, event: str, argument: object):
        call = self._calls[frame]
        if event == "exception":
            call.open = None
        elif event == "line":
            if call.open and not call.open.line <= frame.f_lineno <= call.open.end:
                self._check(frame, call, None)
            if call.open is None:
                call.open = next((c for c in call.known if c.line <= frame.f_lineno <= c.end), None)
        elif event == "return":
            if call.open:
                self._check(frame, call, argument)
            del self._calls[frame]
        return self._on_line

    def _check(self, frame: FrameType, call: "_Call", returned: object) -> None:
        claim, call.open = call.open, None
        if claim.targets:
            scope = {**frame.f_globals, **frame.f_locals}
            values = [eval(target, scope) for target in claim.targets]
        else:
            values = list(returned) if isinstance(returned, tuple) else [returned]
        if len(values) == 1 and isinstance(values[0], tuple | list) and len(claim.shapes) > 1:
            values = list(values[0])
        pairs = [(v, s) for v, s in zip(values, claim.shapes, strict=False) if v is not None]
        if not pairs:
            return  # an optional tensor that this run does without
        file = frame.f_code.co_filename
        self.reached.add((file, claim.line))
        where = f"{Path(file).name}:{claim.end}: {claim.text}"
        if len(values) != len(claim.shapes):
            self.failures.append(f"{where}, but there are {len(values)} values")
            return
        for value, shape in pairs:
            found = shape_of(value)
            left = [e for known in call.worlds for e in fits(shape, found, known, self.sizes)]
            if not left:
                bound = call.worlds[0] if len(call.worlds) == 1 else {}
                self.failures.append(f"{where}, but it is {found} where {bound or self.sizes}")
                return
            call.worlds = left


@dataclass
class _Call:
    known: list[Claim]
    worlds: list[dict[str, int]]  # what the letters may mean in this call, given all checks so far
    open: Claim | None = None


def shape_of(value: object) -> tuple[int, ...] | str:
    """The shape of a tensor, or the length of a flat list; else the type's name."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape)
    if isinstance(value, list | tuple) and all(isinstance(v, int | float) for v in value):
        return (len(value),)
    return type(value).__name__


def fits(
    shape: tuple[str, ...], found, known: dict[str, int], sizes: Sizes
) -> list[dict[str, int]]:
    """The meanings of the letters, in line with `known`, that make `shape` say `found`."""
    if isinstance(found, str):
        return []
    if shape and shape[0] in _ANY:
        shape = shape[1:]
        if len(found) < len(shape):
            return []
        found = found[len(found) - len(shape) :]
    if len(found) != len(shape):
        return []
    names = sorted({n for d in shape for n in re.findall(r"[A-Za-z_]\w*", d)} - set(known))
    # A name that the run does not know: only where it stands alone can it be read off.
    options = [
        sizes.get(n) or {f for d, f in zip(shape, found, strict=True) if d == n} for n in names
    ]
    choices = itertools.product(*options)
    meanings = [{**known, **dict(zip(names, choice, strict=True))} for choice in choices]
    return [m for m in meanings if tuple(eval(d, {}, m) for d in shape) == found]


def claims(source: str) -> list[Claim]:
    """Every shape comment of a module, with the statement that it belongs to.

    Raises:
        ValueError: a shape comment at something that neither assigns nor returns.
    """
    comments = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        alone = token.line.strip().startswith("#")
        if token.type == tokenize.COMMENT and not alone:
            match = _COMMENT.match(token.string)
            shapes = match and _parse(match[1])
            if shapes:
                comments[token.start[0]] = (match[1], shapes)
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.stmt) and not hasattr(node, "body") and node.end_lineno in comments:
            text, shapes = comments.pop(node.end_lineno)
            found.append(_claim(node, text, shapes))
    if comments:
        lines = ", ".join(f"line {line}: # {text}" for line, (text, _) in sorted(comments.items()))
        raise ValueError(f"shape comments that belong to no statement: {lines}")
    return sorted(found, key=lambda c: c.line)


def _claim(node: ast.stmt, text: str, shapes: tuple) -> Claim:
    if isinstance(node, ast.Return):
        targets = ()
    elif isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
        target = node.targets[-1] if isinstance(node, ast.Assign) else node.target
        members = target.elts if isinstance(target, ast.Tuple | ast.List) else [target]
        targets = tuple(ast.unparse(m) for m in members)
    else:
        raise ValueError(f"line {node.end_lineno}: # {text}: nothing is assigned here")
    return Claim(node.lineno, node.end_lineno, text, shapes, targets)


def _parse(text: str) -> tuple[tuple[str, ...], ...] | None:
    """The shapes of a comment's text; None where it only looks like one."""
    shapes = []
    for times, inside in re.findall(r"(?:(\d+)\s*[×x]\s*)?\(([^()]*)\)", text):
        dimensions = tuple(
            d.strip().replace("·", "*").replace("−", "-").replace("/", "//")
            for d in inside.split(",")
            if d.strip()
        )
        for i, dimension in enumerate(dimensions):
            if i == 0 and dimension in _ANY:
                continue
            if not re.fullmatch(r"[\w+*/ -]+", dimension) or not _is_size(dimension):
                return None
        shapes += [dimensions] * int(times or 1)
    return tuple(shapes)


def _is_size(dimension: str) -> bool:
    """Whether it is arithmetic over numbers and names, and not some words in brackets."""
    try:
        tree = ast.parse(dimension, mode="eval")
    except SyntaxError:
        return False
    allowed = (ast.Expression, ast.BinOp, ast.Name, ast.Constant, ast.operator, ast.Load)
    return all(isinstance(node, allowed) for node in ast.walk(tree))
