"""The built-in sources: what they hold, what they leave out, names that are no source."""

import sysconfig
from collections import Counter

import pytest

from expertly.data.builtin import builtin_files
from expertly.data.config import Source
from expertly.data.documents import File
from expertly.data.sources import READERS, expand, open_source
from expertly.errors import ExpertlyError


def read(file):
    return list(READERS[file.kind](file, "text", lambda *_: None))


def by_id(name, kind):
    return {file.id: file for file in builtin_files(name) if file.kind == kind}


def test_code_is_the_library_without_tests_and_tables():
    ids = by_id("stdlib:code", "text")
    assert {"json/__init__.py", "argparse.py", "asyncio/base_events.py"} <= ids.keys()
    assert len(ids) > 300
    left_out = {"test", "tests", "encodings", "pydoc_data", "site-packages", "idle_test"}
    assert not [name for name in ids if left_out & set(name.split("/"))]
    assert "html/entities.py" not in ids
    assert not [name for name in ids if "_sysconfigdata" in name]


def test_docs_hold_a_document_per_topic():
    (topics,) = by_id("stdlib:docs", "topics").values()
    documents = {document.id: document.text for document in read(topics)}
    assert len(documents) > 50
    assert "for" in documents["pydoc_data/topics.py:for"]


def test_docs_hold_docstrings_below_their_names():
    file = by_id("stdlib:docs", "docstrings")["json/__init__.py"]
    (document,) = read(file)
    assert document.id == "json/__init__.py"  # as in stdlib:code: held out together
    assert document.text.startswith("json\nJSON (JavaScript Object Notation)")
    assert "\n\njson.dumps\nSerialize" in document.text
    assert "import" not in document.text.split("json.dumps\n")[1][:80]


def test_no_file_is_both_code_and_table():
    tables = by_id("stdlib:tables", "text")
    assert {"encodings/cp1252.py", "html/entities.py"} <= tables.keys()
    assert not tables.keys() & by_id("stdlib:code", "text").keys()
    assert not tables.keys() & by_id("stdlib:docs", "text").keys()


@pytest.mark.parametrize(
    ("name", "suffixes"),
    [
        ("site:code", {".py"}),
        ("site:headers", {".h", ".hpp", ".cuh"}),
        ("site:texts", {".txt", ".md", ".rst", ""}),
    ],
)
def test_site_takes_small_files_of_its_kind(name, suffixes):
    files = builtin_files(name)
    assert Counter(file.path.suffix for file in files).keys() <= suffixes
    assert files
    assert max(file.path.stat().st_size for file in files) <= 1_000_000
    assert not [file.id for file in files if "tests" in file.id.split("/")]


def test_an_html_page_keeps_its_words(tmp_path):
    page = tmp_path / "help.html"
    page.write_text("<head><title>x</title></head><p>a &lt; <b>b</b></p>\n \n\n<p>c</p>")
    assert read(File("help.html", page, "page")) == [("help.html", "a < b\n\nc")]


def test_unparsable_code_has_no_docstrings(tmp_path):
    broken = tmp_path / "broken.py"
    broken.write_text("def (")
    assert read(File("broken.py", broken, "docstrings")) == []


@pytest.fixture
def bare_python(tmp_path, monkeypatch):
    """A Python without documentation tables or packages, as small distributions split it."""
    (tmp_path / "os.py").write_text('"""Operating system."""\n')
    monkeypatch.setattr(sysconfig, "get_path", lambda key: str(tmp_path))


def test_a_domain_that_this_python_lacks_is_named_and_left_out(bare_python):
    sources, missing = expand([Source(path="stdlib", weight=1.0), Source(path="site")])
    assert [source.domain for source in sources] == ["code", "docs", "site-code"]
    assert [source.weight for source in sources] == [0.5, 0.5, None]
    assert missing == ["stdlib:tables", "site:headers", "site:texts"]


def test_asking_for_a_domain_that_this_python_lacks_is_refused(bare_python):
    with pytest.raises(ExpertlyError, match=r"error\[E303\] stdlib:tables.*FIX: install it"):
        open_source(Source(path="stdlib:tables"))


def test_a_misspelt_domain_is_refused_with_the_nearest():
    with pytest.raises(ExpertlyError, match=r"error\[E303\] stdlib:doc:.*FIX: write stdlib:docs"):
        expand([Source(path="stdlib:doc")])
