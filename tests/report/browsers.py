"""Real browsers, without a window: the one inside of kaleido's wheel, and what is installed."""

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Sequence

import kaleido

SCRIPT = Path(__file__).with_name("browser.js")
_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# no window, no sandbox (containers rarely allow one), no network at all, messages to stderr
_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-breakpad",
    "--allow-file-access-from-files",
    "--proxy-server=127.0.0.1:9",
    "--enable-logging=stderr",
    "--log-level=0",
]


# Comes before the page's policy, which does not forbid it, and its script.
_WATCH = """<script>
window.problems = [];
addEventListener("error", function (event) {
  problems.push("error: " + (event.message || event.target.outerHTML));
}, true);
addEventListener("unhandledrejection", function (event) { problems.push("" + event.reason); });
addEventListener("securitypolicyviolation", function (event) {
  problems.push(event.violatedDirective + ": " + event.blockedURI);
});
["error", "warn", "log"].forEach(function (kind) {
  console[kind] = function (text) { problems.push("console." + kind + ": " + text); };
});
</script>"""


class Visit(NamedTuple):
    """What browser.js found at every width, and what the browser printed about the page.

    Not every browser prints; ``facts[...]["problems"]`` has errors and refused requests.
    """

    facts: List[Dict[str, Any]]
    console: List[str]


def browsers() -> List[str]:
    """ "kaleido" and the paths of further browsers on this machine."""
    found = [shutil.which(name) for name in _NAMES]
    return ["kaleido", *dict.fromkeys(os.path.realpath(path) for path in found if path)]


def visit(browser: str, page: Path, widths: Sequence[int], folder: Path) -> Visit:
    """Load ``page`` in frames of these widths.

    Args:
        folder: for files of the browser.
    """
    watched = folder / "watched.html"
    watched.write_text(page.read_text().replace("<head>", f"<head>{_WATCH}", 1))
    settings = {"url": watched.as_uri(), "widths": list(widths)}
    if browser == "kaleido":
        return _kaleido(settings, folder)
    return _installed(browser, settings, folder)


def _kaleido(settings: Dict[str, Any], folder: Path) -> Visit:
    """kaleido is a Chromium that loads a plotting library and calls one function of it."""
    program = Path(kaleido.__file__).with_name("executable") / "kaleido"
    script = shutil.copy(SCRIPT, folder / "browser.js")
    library = f"--plotlyjs='{Path(script).as_uri()}'"
    command = [str(program), "plotly", library, *_FLAGS]
    request = {"data": {"data": [], "layout": settings}, "format": "svg"}
    request.update(width=100, height=100, scale=1)
    done = subprocess.run(
        command, input=json.dumps(request) + "\n", capture_output=True, text=True, timeout=300
    )
    started, answer, *_ = done.stdout.splitlines() + [""] * 2
    assert json.loads(started or "{}").get("code") == 0, done.stdout + done.stderr
    answer = json.loads(answer)
    assert answer["code"] == 0, answer
    return Visit(json.loads(answer["result"]), _console(done.stderr))


def _installed(browser: str, settings: Dict[str, Any], folder: Path) -> Visit:
    start = folder / "start.html"
    start.write_text(
        f'<!DOCTYPE html><meta charset="utf-8"><title>x</title>'
        f'<body data-settings="{html.escape(json.dumps(settings))}">'
        f"<script>{SCRIPT.read_text()}</script></body>"
    )
    command = [browser, "--headless", *_FLAGS, f"--user-data-dir={folder / 'profile'}"]
    command += ["--window-size=1600,1200", "--virtual-time-budget=60000", "--dump-dom"]
    done = subprocess.run([*command, start.as_uri()], capture_output=True, text=True, timeout=300)
    found = re.search(r'<pre id="facts">(.*?)</pre>', done.stdout, re.S)
    assert found, done.stdout[-2000:] + done.stderr[-2000:]
    return Visit(json.loads(html.unescape(found[1])), _console(done.stderr))


def _console(log: str) -> List[str]:
    """Messages of pages: errors, refused requests, console.log."""
    return [line for line in log.splitlines() if ":CONSOLE" in line]
