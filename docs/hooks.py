"""MkDocs: what the pages take from the rest of the repository.

The benchmarks' charts become part of the site; in the repository they stay where they are. A link to
another file outside of docs/ is for those who read the pages in the repository; in the site its text alone
remains.
"""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

CHARTS = "benchmarks/results"
LINK_OUT_OF_DOCS = re.compile(r"(?<!!)\[([^\]]+)\]\(\.\./[^)]+\)")


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the charts to the files of the site."""
    root = Path(config.config_file_path).parent
    for chart in sorted((root / CHARTS).glob("*.png")):
        files.append(File.generated(config, f"{CHARTS}/{chart.name}", abs_src_path=str(chart)))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Point at the charts in the site, and drop links that lead out of it."""
    return LINK_OUT_OF_DOCS.sub(r"\1", markdown.replace(f"](../{CHARTS}/", f"]({CHARTS}/"))
