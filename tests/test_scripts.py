"""Scripts, README and documentation name the same commands and switches."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def shell_lines(page: Path) -> list[str]:
    """Lines of the fenced shell blocks of a page, without comments."""
    blocks = re.findall(r"^```(?:bash|sh|console)\n(.*?)^```$", page.read_text(), re.M | re.S)
    lines = (
        line.partition(" #")[0].strip().removeprefix("$ ") for line in "".join(blocks).splitlines()
    )
    return [line for line in lines if line and not line.startswith("#")]


def test_readme_has_the_two_set_up_commands() -> None:
    scripts = [line for line in shell_lines(README) if line.startswith("bash scripts/")]
    assert {line.split()[1] for line in scripts} >= {"scripts/demo.sh", "scripts/test.sh"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_scripts_exist(page: Path) -> None:
    named = re.findall(r"\b((?:scripts|\.ci)/[\w.]+\w)", page.read_text())
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("script", sorted((ROOT / "scripts").glob("*.sh")), ids=lambda s: s.name)
def test_scripts_parse(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)


def test_ci_runs_the_test_script_of_the_readme() -> None:
    lines = [line for line in (ROOT / ".ci" / "run").read_text().splitlines() if line[:1] != "#"]
    assert lines == ["set -euo pipefail", 'cd "$(dirname "$0")/.."', "exec bash scripts/test.sh"]


def test_commands_in_documentation_exist() -> None:
    typer = pytest.importorskip("typer", reason="needs the extra [cli]")
    from alignops.cli import app

    root = typer.main.get_command(app)
    for page in PAGES:
        for line in shell_lines(page):
            if not line.startswith("alignops "):
                continue
            command, words = root, line.split()[1:]
            while hasattr(command, "commands") and words and words[0] in command.commands:
                command = command.commands[words.pop(0)]
            assert not hasattr(command, "commands"), f"{page.name}: {line}"
            known = {option for parameter in command.params for option in parameter.opts}
            used = {word.partition("=")[0] for word in words if word.startswith("--")}
            assert used <= known | {"--help"}, f"{page.name}: {line}"


def test_environment_variables_are_documented_and_used() -> None:
    sources = [*ROOT.glob("alignops/**/*.py"), *ROOT.glob("triton_kernels/**/*.py")]
    sources += [ROOT / "setup.py", ROOT / "build_backend.py"]
    name = re.compile(r"\bALIGNOPS_[A-Z_]+\b")
    used = {found for source in sources for found in name.findall(source.read_text())}
    rows = [re.findall(r"^\| `(ALIGNOPS_[A-Z_]+)`", page.read_text(), re.M) for page in PAGES]
    documented = [found for page in rows for found in page]
    assert sorted(documented) == sorted(used)  # each in one place
