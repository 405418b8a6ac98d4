"""Hooks of the pages' build: pages from outside `docs`, notebooks as pages, and nothing that is fetched from elsewhere.

Links are those of the repository, where they work as well: the hooks turn them into links between pages.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
# What of the repository becomes part of the site, and the folder of the site where it goes.
OUTSIDE = {
    "README.md": "",
    "CHANGELOG.md": "",
    "CITATION.cff": "",
    "CONTRIBUTING.md": "",
    "LICENSE": "",
    "benchmarks/results/*": "results",
    "examples/*.py": "examples",
    "examples/browser/*.*": "examples/browser",
    "notebooks/*.ipynb": "notebooks",
    "recipes/*.yaml": "recipes",
    "src/bcoskit/assets/*.md": "results",
}
_LINK = re.compile(r"\]\(([^()\s#]+)(#[^()\s]*)?\)")
_FETCHED = re.compile(r"<(?:script|img|iframe|source)\b[^>]*\ssrc=[\"']?(?:https?:)?//[^>]*>")
_LINKED = re.compile(r"<link\b[^>]*\shref=[\"']?(?:https?:)?//[^>]*>")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files of `OUTSIDE`."""
    for pattern, folder in OUTSIDE.items():
        for path in sorted(ROOT.glob(pattern)):
            uri = _address(path, folder)
            if path.suffix == ".ipynb":
                file = File.generated(config, uri, content=as_markdown(json.loads(path.read_text())))
            else:
                file = File.generated(config, uri, abs_src_path=str(path))
            files.append(file)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links between files of the repository into links between pages."""
    pages = {path: _address(path, folder) for pattern, folder in OUTSIDE.items() for path in ROOT.glob(pattern)}
    origins = {uri: path for path, uri in pages.items()}
    here = page.file.src_uri
    origin = origins.get(here, ROOT / "docs" / here)

    def linked(match: re.Match[str]) -> str:
        target = Path(os.path.normpath(origin.parent / match[1]))
        if target in pages:
            uri = pages[target]
        elif target.is_relative_to(ROOT / "docs") and target.is_file():
            uri = target.relative_to(ROOT / "docs").as_posix()
        else:
            return match[0]
        return f"]({os.path.relpath(uri, Path(here).parent)}{match[2] or ''})"

    return _LINK.sub(linked, markdown)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Refuse a page that would fetch something from elsewhere."""
    fetched = [*_FETCHED.findall(output), *_LINKED.findall(output)]
    if fetched:
        raise PluginError(f"{page.file.src_uri} fetches from elsewhere: {fetched[0]}")
    return output


def as_markdown(notebook: dict[str, Any]) -> str:
    """A notebook as a page: its texts, its code, and what the code put out."""
    parts: list[str] = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
        else:
            parts.append(f"```python\n{source}\n```")
            parts.extend(_shown(output) for output in cell["outputs"])
    return "\n\n".join(parts) + "\n"


def _shown(output: dict[str, Any]) -> str:
    data = output.get("data", {})
    if "image/png" in data:
        return f"![Output](data:image/png;base64,{''.join(data['image/png']).replace(chr(10), '')})"
    text = "".join(output.get("text", data.get("text/plain", "")))
    return f"```text\n{text.rstrip()}\n```"


def _address(path: Path, folder: str) -> str:
    name = {"README.md": "index.md"}.get(path.name, path.name)
    return str(Path(folder, name).with_suffix(".md" if path.suffix == ".ipynb" else path.suffix))
