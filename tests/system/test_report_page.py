"""The report in a browser without a window: what axe-core, a checker of accessibility, finds, and whether it fits a phone."""
from __future__ import annotations

import json
import os
import re
import shutil
import subprocess

import pytest
from synthetic import write_run

from fedms import report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.skipif("FEDMS_FULL" not in os.environ, reason="a minute: make test-full"),
    pytest.mark.skipif(BROWSER is None or shutil.which("npm") is None, reason="needs chromium and npm"),
]

CHECK = """
<script>
document.querySelectorAll("details").forEach(each => { each.open = true; });
axe.run().then(found => {
  const told = {passes: found.passes.length, wide: document.documentElement.scrollWidth > innerWidth,
                violations: found.violations.map(v => [v.id, v.nodes[0].html])};
  document.body.textContent = "FOUND" + JSON.stringify(told) + "END";
});
</script>
"""


@pytest.fixture(scope="module")
def checker(tmp_path_factory) -> str:
    """axe-core, as npm brings it."""
    folder = tmp_path_factory.mktemp("axe")
    (folder / "package.json").write_text("{}")
    done = subprocess.run(["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "axe-core@4"], cwd=folder,
                          capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"npm cannot fetch axe-core: {done.stderr[-200:]}")
    return (folder / "node_modules/axe-core/axe.min.js").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("study")
    for method in ("local", "fedavg", "fedms"):
        for seed in range(2):
            write_run(folder / f"{method}-seed{seed}", method, seed)
    return report.write_report(folder).read_text(encoding="utf-8")


def look(page: str, checker: str, folder, width: int, *options: str) -> dict:
    """What the checker finds in a window of this width."""
    page = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)        # it would stop the checker
    (folder / "page.html").write_text(page.replace("</body>", f"<script>{checker}</script>{CHECK}</body>"), encoding="utf-8")
    done = subprocess.run([BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900",
                           "--virtual-time-budget=60000", "--dump-dom", *options, f"file://{folder}/page.html"],
                          capture_output=True, text=True, timeout=120, cwd=folder)
    found = re.search(r"FOUND(.*)END", done.stdout)
    assert found, done.stderr[-2000:]
    return json.loads(found[1].replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">"))


@pytest.mark.parametrize("width, options", [(1120, ()), (500, ()), (1120, ("--blink-settings=preferredColorScheme=0",))],
                         ids=["wide", "narrow", "dark"])
def test_nobody_is_kept_from_reading(page, checker, tmp_path, width, options):
    found = look(page, checker, tmp_path, width, *options)
    assert found["violations"] == [] and found["passes"] > 30 and not found["wide"]


def test_the_checker_finds_a_fault(page, checker, tmp_path):
    found = look(page.replace('<html lang="en">', "<html>"), checker, tmp_path, 1120)
    assert "html-has-lang" in [name for name, _ in found["violations"]]
