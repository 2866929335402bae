"""The page in a real browser: it opens from disk, without a network, and the browser has nothing to complain about."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qtool.quantize.measure.report import write_report

BROWSER = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), "")


@pytest.mark.skipif(not BROWSER, reason="no Chromium or Chrome on this machine")
def test_the_page_opens_from_disk_without_an_error(made_up: Callable[..., Any], tmp_path: Path) -> None:
    findings, statistics = made_up("llama", 2)
    folder = tmp_path / "report"
    folder.mkdir()
    write_report(folder, findings, statistics, title="a model", facts={})
    command = [
        *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"),
        # Every host fails to resolve, so whatever the page might ask for would be an error in the log.
        *("--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr", "--v=0", "--dump-dom"),
    ]
    page = [*command, f"file://{folder / 'report.html'}"]
    done = subprocess.run(page, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line or "net::ERR" in line] == []
    assert "Largest values by layer" in done.stdout
    assert "<button" in done.stdout  # made by the page's own script, which therefore ran
