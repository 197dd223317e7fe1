"""Text that every machine has: Python's standard library and the packages installed beside us.

`stdlib` is code, docs and tables; `site` is code, headers and texts. They differ in vocabulary
and in structure, which is what experts need in order to differ.
"""

import ast
import html
import re
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

from expertly.data.documents import Document, File, Skip, decode, walk
from expertly.errors import ExpertlyError, nearest

# path of a source -> name of its domain
DOMAINS = {
    "stdlib:code": "code",
    "stdlib:docs": "docs",
    "stdlib:tables": "tables",
    "site:code": "site-code",
    "site:headers": "site-headers",
    "site:texts": "site-texts",
}

_TESTS = frozenset({"test", "tests", "idle_test", "__pycache__"})
_NOT_LIBRARY = _TESTS | {"site-packages", "dist-packages", "lib-dynload"}
_TOPICS = "pydoc_data/topics.py"  # the language reference, as help() shows it
_TABLES = (
    "encodings/*.py",
    "html/entities.py",
    "lib2to3/*Grammar.txt",
    "test/decimaltestdata/*.decTest",
    "test/*_testcases.txt",
    "test/floating_points.txt",
)
_PROSE = ("LICENSE*", "*/*.txt", "*/*.rst")
_SITE_SUFFIXES = {
    "site:code": (".py",),
    "site:headers": (".h", ".hpp", ".cuh"),
    "site:texts": (".txt", ".md", ".rst"),
}
# lists for machines that only look like prose
_NOT_PROSE = {"CMakeLists.txt", "top_level.txt", "entry_points.txt", "SOURCES.txt", "requires.txt"}
_LARGEST_SITE_FILE = 1_000_000  # bytes; above lie generated tables


def names(path: str) -> list[str]:
    """The built-in sources that a path stands for: none, itself, or the three of a bare name.

    Raises E303 for `stdlib:` or `site:` and a word that is not one of theirs.
    """
    family, colon, _ = path.partition(":")
    if family not in ("stdlib", "site"):
        return []
    if not colon:
        return [name for name in DOMAINS if name.startswith(f"{family}:")]
    if path not in DOMAINS:
        raise ExpertlyError("E303", path, "no such built-in source", fix=nearest(path, DOMAINS))
    return [path]


def builtin_files(name: str) -> list[File]:
    """The files of one built-in source; empty when this Python was installed without them."""
    if name in _SITE_SUFFIXES:
        return list(_site_files(name))
    root = Path(sysconfig.get_path("stdlib"))
    if name == "stdlib:tables":
        return _numbered(root, _globs(root, _TABLES), "text")
    code = _numbered(root, _library_code(root), "text")
    if name == "stdlib:code":
        return code
    return [
        *_numbered(root, _globs(root, (_TOPICS,)), "topics"),
        *_numbered(root, _globs(root, ("idlelib/help.html",)), "page"),
        *_numbered(root, _prose(root), "text"),
        # Same id as the code it comes from: both are held out, or neither.
        *(file._replace(kind="docstrings") for file in code),
    ]


def _numbered(root: Path, paths: Iterable[Path], kind: str) -> list[File]:
    return [File(path.relative_to(root).as_posix(), path, kind) for path in paths]


def _globs(root: Path, patterns: Iterable[str]) -> list[Path]:
    return [path for pattern in patterns for path in sorted(root.glob(pattern)) if path.is_file()]


def _library_code(root: Path) -> Iterator[Path]:
    for path in walk(root, _NOT_LIBRARY | {"encodings", "pydoc_data"}):
        generated = path.name.startswith("_sysconfigdata") or path == root / "html/entities.py"
        if path.suffix == ".py" and not generated:
            yield path


def _prose(root: Path) -> list[Path]:
    tables = set(_globs(root, _TABLES))
    found = _globs(root, _PROSE)
    return [path for path in found if path not in tables and path.parent.name not in _NOT_LIBRARY]


def _site_files(name: str) -> Iterator[File]:
    roots = dict.fromkeys(Path(sysconfig.get_path(key)) for key in ("purelib", "platlib"))
    for root in roots:
        for path in walk(root, _TESTS):
            readme = path.name == "METADATA"  # a package's description
            wanted = path.suffix in _SITE_SUFFIXES[name] and path.name not in _NOT_PROSE
            if (wanted or (readme and name == "site:texts")) and _small(path):
                yield File(path.relative_to(root).as_posix(), path, "text")


def _small(path: Path) -> bool:
    return path.stat().st_size <= _LARGEST_SITE_FILE


def read_topics(file: File, column: str, skip: Skip) -> Iterator[Document]:
    """One document per topic of pydoc's help; the file is parsed, never run."""
    for node in ast.parse(decode(file, skip)).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            for topic, text in ast.literal_eval(node.value).items():
                yield Document(f"{file.id}:{topic}", text)


def read_page(file: File, column: str, skip: Skip) -> Iterator[Document]:
    """The words of an HTML page, without its head and its tags."""
    body = re.sub(r"(?s)<(head|script|style)\b.*?</\1>|<[^>]*>", "", decode(file, skip))
    text = re.sub(r"\n\s*\n+", "\n\n", html.unescape(body)).strip()
    if text:
        yield Document(file.id, text)


def read_docstrings(file: File, column: str, skip: Skip) -> Iterator[Document]:
    """A module's docstrings as one document, each below the name that it describes."""
    try:
        tree = ast.parse(decode(file, skip))
    except (SyntaxError, ValueError):
        skip(file.id, "undecodable")
        return
    module = file.id.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    text = "\n\n".join(_docstrings(tree, module))
    if text:
        yield Document(file.id, text)


def _docstrings(
    node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, name: str
) -> Iterator[str]:
    docstring = ast.get_docstring(node)
    if docstring:
        yield f"{name}\n{docstring}"
    for inner in node.body:
        if isinstance(inner, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _docstrings(inner, f"{name}.{inner.name}")
