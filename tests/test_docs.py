"""Runs the examples: fenced Python of README.md and docs/, and docstrings of every module."""

import doctest
import importlib
import json
import pkgutil
import re
from pathlib import Path

import pytest

import alignops

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
OPTIONAL = {"transformers", "gguf", "triton", "typer", "tqdm", "matplotlib", "psutil", "rich"}
OPTIONAL |= {"tokenizers", "pyarrow"}


def _run(test: doctest.DocTest) -> None:
    runner = doctest.DocTestRunner(optionflags=OPTIONS)
    output: list[str] = []
    runner.run(test, out=output.append, clear_globs=False)
    if runner.failures:
        pytest.fail("".join(output), pytrace=False)


def _modules() -> list[str]:
    found = pkgutil.walk_packages(alignops.__path__, "alignops.")
    return ["alignops", *(m.name for m in found if m.name.rsplit(".")[-1] not in {"_C", "_cuda"})]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_page(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = page.read_text()
    monkeypatch.chdir(tmp_path)
    parser, names = doctest.DocTestParser(), {"__name__": "__main__"}
    examples = []
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start(1))
        found = parser.get_examples(match.group(1), page.name)
        assert found, f"{page.name}:{line + 1}: Python without a prompt would not be tested"
        for example in found:
            example.lineno += line
        examples += found
    _run(doctest.DocTest(examples, names, page.name, str(page), 0, text))


@pytest.mark.parametrize("name", _modules())
def test_docstrings(name: str) -> None:
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name not in OPTIONAL:
            raise
        pytest.skip(f"{error.name} is not installed")
    for test in doctest.DocTestFinder(exclude_empty=True).find(module):
        _run(test)


def _links(page: Path) -> list[str]:
    return re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    missing = [link for link in _links(page) if not (page.parent / link).exists()]
    assert not missing


def test_an_example_can_fail() -> None:
    test = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "wrong", None, 0)
    with pytest.raises(pytest.fail.Exception, match="Got"):
        _run(test)


def test_figures_of_the_readme_are_those_of_a_committed_result(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks import render, report

    page = (ROOT / "README.md").read_text()
    found = [(core, render.readme_block(core).search(page)) for core in report.CORES]
    shown = {core: match.groups() for core, match in found if match is not None}
    assert "ternary" in shown
    for core, (name, figures) in shown.items():
        document = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
        assert figures == report.report_of(core).readme(document, name)


def test_every_environment_variable_is_documented() -> None:
    sources = [ROOT / "setup.py", ROOT / "build_backend.py"]
    for folder in ("alignops", "triton_kernels"):
        sources += (ROOT / folder).rglob("*.py")
    used = {
        name for path in sources for name in re.findall(r"\bALIGNOPS_[A-Z_]+\b", path.read_text())
    }
    pages = "".join(page.read_text() for page in PAGES)
    assert used <= set(re.findall(r"\bALIGNOPS_[A-Z_]+\b", pages))
