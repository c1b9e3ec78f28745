"""A headless Chromium, where one is installed: opens a page, runs a script in it, returns what became of the page."""

import re
import shutil
import subprocess
from pathlib import Path

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
MISSING = f"no browser: none of {', '.join(NAMES)} is installed (Debian: apt-get install chromium-headless-shell)"


def find_browser() -> str | None:
    return next(filter(None, map(shutil.which, NAMES)), None)


def open_page(page: Path, script: str = "", *, dark: bool = False) -> tuple[str, list[str]]:
    """The document after its scripts and ``script``, and what they wrote to the console (errors included)."""
    copy = page.with_name(f"{page.stem}_opened.html")
    copy.write_text(page.read_text(encoding="utf-8").replace("</body>", f"<script>{script}</script></body>"), "utf-8")
    scheme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--log-level=0", *scheme]
    command = [find_browser(), *flags, "--window-size=1200,900", "--dump-dom", copy.as_uri()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout, re.findall(r"CONSOLE[^\n]*", result.stderr)
