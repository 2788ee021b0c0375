"""MkDocs: the benchmarks' charts become part of the site; in the repository they stay where they are."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

CHARTS = "benchmarks/results"


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the charts to the files of the site."""
    root = Path(config.config_file_path).parent
    for chart in sorted((root / CHARTS).glob("*.png")):
        files.append(File.generated(config, f"{CHARTS}/{chart.name}", abs_src_path=str(chart)))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Point at the charts in the site instead of those beside docs/."""
    return markdown.replace(f"](../{CHARTS}/", f"]({CHARTS}/")
