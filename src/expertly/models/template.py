"""A chat template is a program in a model folder: it is read and judged here, never run.

Jinja's sandbox is the fence when a template is rendered; this is the gate before it. What a
template has no honest use for (names that begin with an underscore, other files) is refused.
"""

import re
from collections.abc import Iterator

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from expertly.errors import ExpertlyError

_LONGEST = 2**18  # characters; real ones have some 20,000
# filters and tests that take the name of an attribute
_BY_NAME = {"attr", "groupby", "map", "max", "min", "rejectattr", "selectattr", "sort", "sum"}
_BY_NAME |= {"unique"}
_FORMATS = re.compile(r"\{[^{}]*[.\[]_")  # "{0.__class__}".format(x)
_OTHER_FILES = (nodes.Import, nodes.FromImport, nodes.Include, nodes.Extends)


class _Generation(Extension):
    """transformers' own tag around what the assistant says."""

    tags = {"generation"}  # noqa: RUF012  jinja2's way to declare it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The body alone."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def check_template(text: str, where: str = "chat_template") -> None:
    """Raises E311 for a template that is no Jinja or reaches where templates must not reach."""
    try:
        for why in _faults(text):
            raise ExpertlyError("E311", where, why, fix="remove or correct the chat template")
    except (TemplateError, RecursionError, ValueError, MemoryError) as error:
        why = f"is not a Jinja template ({type(error).__name__}: {str(error)[:100]})"
        raise ExpertlyError(
            "E311", where, why, fix="remove or correct the chat template"
        ) from error


def _faults(text: str) -> Iterator[str]:
    """What is wrong with a template, each with its line."""
    if len(text) > _LONGEST:
        yield f"{len(text)} characters, more than {_LONGEST}"
        return
    environment = ImmutableSandboxedEnvironment(extensions=[LoopControlExtension, _Generation])
    for node in environment.parse(text).find_all(nodes.Node):
        if isinstance(node, _OTHER_FILES):
            yield f"line {node.lineno} reads another file"
        for name in _reached(node):
            if any(part.startswith("_") for part in name.split(".")):
                yield f"line {node.lineno} reaches for {name[:60]}"


def _reached(node: nodes.Node) -> Iterator[str]:
    """The names of attributes and items that a node reaches for, as far as they can be told."""
    if isinstance(node, nodes.Getattr):
        yield node.attr
    elif isinstance(node, nodes.Getitem):
        yield _text(node.arg) or ""
    elif isinstance(node, nodes.Filter | nodes.Test) and node.name in _BY_NAME:
        said = [_text(value) for value in (*node.args, *(given.value for given in node.kwargs))]
        hidden = None in said and "attr" in (node.name, *said)
        yield from ["_ (a computed name)"] if hidden else filter(None, said)
    elif isinstance(node, nodes.Const) and (found := _FORMATS.search(_text(node) or "")):
        yield f"_ in {found[0]}"


def _text(value: nodes.Expr) -> str | None:
    """A text that is written out or put together from such; None for any other expression.

    Not jinja2's own as_const, which computes: "a" * 10**10 is an expression too.
    """
    if isinstance(value, nodes.Const):
        return value.value if isinstance(value.value, str) else ""
    parts = value.nodes if isinstance(value, nodes.Concat) else None
    if isinstance(value, nodes.Add):
        parts = [value.left, value.right]
    if parts is None:
        return None
    texts = [_text(part) for part in parts]
    return None if None in texts else "".join(filter(None, texts))
