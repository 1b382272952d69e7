"""The page of a trace in a real browser: it draws, needs no network, and opens what is linked."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from alignops.spans.report import TraceReport
from tests.spans.test_report import hostile, report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="needs chromium (apt-get install chromium)"
)

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
]


def chromium(folder: Path, page: str, *flags: str) -> str:
    """What the browser prints for a page `report.html#...` of a folder."""
    profile = folder / "profile"
    shutil.rmtree(profile, ignore_errors=True)
    url = f"{(folder / 'report.html').as_uri()}{page}"
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={profile}", *flags, url]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return result.stdout


def colours(path: Path) -> set[str]:
    """All colours of a picture, in hex digits."""
    image = pytest.importorskip("matplotlib.image", reason="needs the extra [bench]")
    rgb = np.rint(image.imread(path)[..., :3] * 255).astype(np.uint8).reshape(-1, 3)
    return {bytes(colour).hex() for colour in np.unique(rgb, axis=0)}


@pytest.fixture
def page(tmp_path: Path) -> Path:
    report().save(tmp_path / "report.html")
    return tmp_path


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_screenshot_has_the_shades(page: Path, scheme: str) -> None:
    shot = page / "shot.png"
    dark = ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
    chromium(page, "", f"--screenshot={shot}", "--window-size=700,700", *dark)
    shades = {"light": ("f7f6f3", "fbd79a", "e6eef6"), "dark": ("14171b", "644816", "1f2f40")}
    assert set(shades[scheme]) <= colours(shot)


def test_link_opens_the_documents_of_a_span(page: Path) -> None:
    dom = chromium(page, "#c1s1", "--dump-dom")
    states = [part.partition(">")[0] for part in dom.split("<details")[1:]]
    assert ["open" in state for state in states] == [True, True, False]


def test_browser_sees_the_text_that_was_written(page: Path) -> None:
    made: TraceReport = hostile()
    made.save(page / "report.html")
    dom = chromium(page, "", "--dump-dom")
    assert "<script" not in dom
    assert "<img" not in dom
    assert dom.count("<article") == 1
