"""What the site has beside docs/: README as its first page, the files of the repository that pages link, the API reference.

Hooks of MkDocs (mkdocs.yml). Pages link files outside docs/ by relative addresses, which hold in a clone and on a Git host; in the
site they lead to a page with the file's text. It imports nothing of seqmodels: building the site needs no JAX.
"""

import html
import json
import os
import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)\s#]+)(#[^)\s]*)?(?=[)\s])")
LANGUAGES = {
    ".py": "python",
    ".json": "json",
    ".bib": "bibtex",
    ".cff": "yaml",
    ".md": "markdown",
    ".toml": "toml",
    ".yml": "yaml",
}
SHOWN_BYTES = 200_000  # of a file; beyond, its beginning
# Modules of the API reference, by page; a package stands for itself, "package.*" for its modules.
API = {
    "seqmodels": [
        "seqmodels.run",
        "seqmodels.model",
        "seqmodels.pattern",
        "seqmodels.config",
        "seqmodels.errors",
        "seqmodels.shapes",
    ],
    "ops": ["seqmodels.ops", "seqmodels.ops.*"],
    "mixers": ["seqmodels.mixers", "seqmodels.mixers.*"],
    "layers": ["seqmodels.layers.*"],
    "data": ["seqmodels.data", "seqmodels.data.text.*", "seqmodels.data.tasks.*"],
    "decoding": ["seqmodels.decoding.*"],
    "evaluation": ["seqmodels.evaluation.*"],
    "training": ["seqmodels.training.*"],
    "comparison": ["seqmodels.comparison.*", "seqmodels.comparison.report", "seqmodels.comparison.report.*"],
    "interop": ["seqmodels.interop.*"],
}


def on_config(config):
    """The API's pages, into the navigation."""
    config.nav[-1]["API"] += [f"api/{name}.md" for name in API]
    return config


def on_files(files: Files, config) -> Files:
    """Add the pages that are made here."""
    files.append(File.generated(config, "index.md", content=(ROOT / "README.md").read_text(encoding="utf-8")))
    files.append(File.generated(config, "tour.md", content=notebook_text(ROOT / "docs" / "tour.ipynb")))
    for name, text in api_pages().items():
        files.append(File.generated(config, f"api/{name}.md", content=text))
    for path in sorted(linked(files)):
        if path.is_file() and path.suffix in (".png", ".svg"):
            files.append(File.generated(config, f"source/{path.relative_to(ROOT).as_posix()}", abs_src_path=str(path)))
        else:
            files.append(File.generated(config, source_page(path), content=source_text(path)))
    return files


def on_page_markdown(markdown: str, page, config, files: Files) -> str:
    """Links out of docs/, to the site's copies."""
    return LINK.sub(lambda link: _in_the_site(link, page.file.src_uri), markdown)


def on_post_build(config) -> None:
    """Links to sources in the reports, which are copied as they are."""
    site, docs = Path(config.site_dir), Path(config.docs_dir)
    for report in site.rglob("report.html"):
        original = docs / report.relative_to(site)

        def address(link: re.Match, original=original, report=report) -> str:
            target = (original.parent / link[1]).resolve()
            if ROOT not in target.parents or docs in target.parents or not target.is_file():
                return link[0]
            return f'href="{os.path.relpath(site / source_page(target).removesuffix(".md"), report.parent)}/"'

        text = report.read_text(encoding="utf-8")
        report.write_text(re.sub(r'href="(\.\./[^"#]+)"', address, text), encoding="utf-8")


def linked(files: Files) -> set[Path]:
    """Files and folders of the repository outside docs/ that pages link, and every mixer's file."""
    found = set((ROOT / "seqmodels" / "mixers").glob("[!_]*.py"))
    for file in files.documentation_pages():
        base = ROOT if file.src_uri == "index.md" else ROOT / "docs" / posixpath.dirname(file.src_uri)
        for link in LINK.finditer(file.content_string):
            target = (base / link[1]).resolve()
            if ROOT in target.parents and ROOT / "docs" not in target.parents and target != ROOT / "docs" and target.exists():
                found.add(target)
    return found | {path for folder in found if folder.is_dir() for path in folder.iterdir() if path.suffix == ".py"}


def source_page(path: Path) -> str:
    """Where the site has a file of the repository."""
    return f"source/{path.relative_to(ROOT).as_posix()}.md"


def source_text(path: Path) -> str:
    """The page of a file, or of a folder: the list of its Python files."""
    name = path.relative_to(ROOT).as_posix()
    if path.is_dir():
        entries = [f"- [{each.name}]({path.name}/{each.name}.md)" for each in sorted(path.glob("*.py"))]
        return "\n".join([f"# {name}", "", *entries, ""])
    text = path.read_text(encoding="utf-8")
    shown = text if len(text) <= SHOWN_BYTES else text[:SHOWN_BYTES] + "\n..."
    language = LANGUAGES[path.suffix] if path.suffix in LANGUAGES else "text"
    code = f'<pre class="source" tabindex="0"><code>{html.escape(shown)}</code></pre>'
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", shown)), default=0))
    highlighted = [f"{fence}{language}", shown.rstrip("\n"), fence]
    return "\n".join([f"# {name}", "", *(highlighted if len(text) <= SHOWN_BYTES else [code]), ""])


def notebook_text(path: Path) -> str:
    """A notebook as Markdown: its texts, and its code between fences."""
    parts = [f"The notebook is [{path.name}]({path.name}); CI runs it."]
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
    return "\n\n".join([parts[1], parts[0], *parts[2:]]) + "\n"


def api_pages() -> dict[str, str]:
    """Text of each page of the reference, by its name."""
    pages = {
        name: "\n\n".join([f"# API: {name}", *(f"::: {module}" for module in modules(patterns))]) + "\n"
        for name, patterns in API.items()
    }
    entries = [f"- [{name}]({name}.md): {', '.join(f'`{each}`' for each in patterns)}" for name, patterns in API.items()]
    about = "Made from the docstrings. Names that begin with an underscore are not part of it."
    return pages | {"index": "\n".join(["# API", "", about, "", *entries, ""])}


def modules(patterns: list[str]) -> list[str]:
    """The modules that the patterns of a page name."""
    found = []
    for each in patterns:
        if each.endswith(".*"):
            folder = ROOT.joinpath(*each.removesuffix(".*").split("."))
            found += [f"{each.removesuffix('.*')}.{path.stem}" for path in sorted(folder.glob("[!_]*.py"))]
        else:
            found.append(each)
    return found


def _in_the_site(link: re.Match, page: str) -> str:
    base = ROOT if page == "index.md" else ROOT / "docs" / posixpath.dirname(page)
    target = (base / link[1]).resolve()
    if ROOT not in target.parents or not target.exists():
        return link[0]
    if ROOT / "docs" in target.parents:
        place = target.relative_to(ROOT / "docs").as_posix()
    elif target.suffix in (".png", ".svg"):
        place = f"source/{target.relative_to(ROOT).as_posix()}"
    elif target == ROOT / "docs":
        place = "index.md"
    else:
        place = source_page(target)
    return posixpath.relpath(place, posixpath.dirname(page) or ".") + (link[2] or "")
