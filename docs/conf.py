"""Sphinx's configuration: Markdown pages, and a reference written from the code each time the site is built."""

from __future__ import annotations

import sys
from pathlib import Path

import unmask

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
import generate  # noqa: E402  (beside this file)

project = "unmask"
author = "the unmask authors"
project_copyright = "the unmask authors, Apache-2.0"
version = release = unmask.__version__
extensions = ["myst_parser"]
exclude_patterns = ["README.md"]
html_theme = "furo"
html_title = "unmask"
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]  # a page may begin with any heading
highlight_language = "text"
pygments_style = "friendly"

generate.write(HERE / "reference")
