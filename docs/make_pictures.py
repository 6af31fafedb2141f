"""Make the README's pictures from a demo of its own: what the terminal shows, and the report in Debian's chromium.

    python docs/make_pictures.py [--chromium /usr/bin/chromium]

It needs what the tests need (`make test` installs it), and chromium.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from io import StringIO
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright
from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text

PICTURES = Path(__file__).parent
COLUMNS = 104
NORMAL = [(48, 54, 61), (240, 113, 120), (126, 211, 139), (230, 192, 104), (110, 168, 254), (198, 146, 233)]
THEME = TerminalTheme((17, 20, 24), (214, 218, 224), [*NORMAL, (102, 204, 214), (214, 218, 224)])
PAGE = """<!doctype html><meta charset="utf-8"><style>
body {{ margin: 0; background: #111418; color: #d6dae0; width: max-content }}
pre {{ margin: 0; padding: 18px 22px; font: 14px/1.38 "DejaVu Sans Mono", monospace }}
</style><body>{code}"""


def said(*command: str) -> str:
    """Return what `turntrace COMMAND` writes to a terminal of COLUMNS, with its colours."""
    environment = {**os.environ, "FORCE_COLOR": "1", "COLUMNS": str(COLUMNS), "TERM": "xterm-256color"}
    done = subprocess.run(
        [Path(sys.executable).parent / "turntrace", *command], capture_output=True, text=True, env=environment
    )
    if done.returncode != 0:
        raise SystemExit(f"turntrace {' '.join(command)}: {done.stderr}")
    return done.stdout


def picture_of_text(browser: Browser, text: str, file: Path) -> None:
    """Draw what a terminal showed."""
    console = Console(record=True, width=COLUMNS, file=StringIO(), force_terminal=True)
    console.print(Text.from_ansi(text), soft_wrap=True)
    code = console.export_html(inline_styles=True, code_format="<pre>{code}</pre>", theme=THEME)
    page = browser.new_page(device_scale_factor=1.2)
    page.set_content(PAGE.format(code=code))
    page.locator("body").screenshot(path=file)
    page.close()


def main() -> None:
    """Make all pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    chromium = parser.parse_args().chromium
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        os.environ["TURNTRACE_LEDGER_URL"] = f"sqlite:///{folder}/ledger.db"
        said("demo")
        newest_first = json.loads(said("sessions", "--json"))
        dearest = max(newest_first, key=lambda session: session["total_cost_usd"] or 0)["id"]
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        picture_of_text(browser, said("sessions"), PICTURES / "sessions.png")
        picture_of_text(browser, said("show", dearest), PICTURES / "show.png")
        report = Path(folder) / "report.html"
        said("report", "-o", str(report))
        page = browser.new_page(viewport={"width": 1100, "height": 880})
        page.goto(report.as_uri())
        page.locator(".js-plotly-plot").first.wait_for()
        page.screenshot(path=PICTURES / "report.png")
        browser.close()


if __name__ == "__main__":
    main()
