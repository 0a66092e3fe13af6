"""Build the site, build/site/: the networks of its interactive page, then Sphinx; ``--check`` reads it in a browser.

Notebooks are shown as they are stored; nothing of them runs. A warning is an error.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path

from check import check
from interactive.export import SOURCES, export
from rooms import PICTURE, svg

DOCS = Path(__file__).parent
ROOT = DOCS.parent
WORK = ROOT / "build"
SITE = WORK / "site"
WEIGHTS = WORK / "static" / "interactive" / "weights.js"
# Sources lie in two folders, and so do the pages.
HOME = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>dgm_pyro</title>
<meta http-equiv="refresh" content="0; url=docs/index.html"><a href="docs/index.html">dgm_pyro</a></html>
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="read every page in a headless Chromium afterwards")
    parser.add_argument("--pictures", type=Path, metavar="FOLDER", help="with --check: keep pictures of some pages")
    args = parser.parse_args()
    start = time.monotonic()
    PICTURE.write_text(svg())
    if not WEIGHTS.exists() or any(source.stat().st_mtime > WEIGHTS.stat().st_mtime for source in SOURCES):
        export(WEIGHTS)
        print(f"trained the networks of the interactive page in {time.monotonic() - start:.0f} s", flush=True)
    shutil.rmtree(SITE, ignore_errors=True)  # Sphinx would leave pages of what is no more
    # All pages anew: what a page refers to may have come or gone since it was read.
    options = ["-E", "-W", "--keep-going", "-q", "-c", str(DOCS), "-d", str(WORK / "doctrees")]
    done = subprocess.run([sys.executable, "-m", "sphinx", *options, str(ROOT), str(SITE)], check=False)
    if done.returncode:
        return done.returncode
    (SITE / "index.html").write_text(HOME)
    size = sum(path.stat().st_size for path in SITE.rglob("*") if path.is_file())
    print(
        f"{(SITE / 'index.html').relative_to(ROOT)}: {size / 1e6:.0f} MB in {time.monotonic() - start:.0f} s",
        flush=True,
    )
    return check(SITE, args.pictures) if args.check else 0


if __name__ == "__main__":
    sys.exit(main())
