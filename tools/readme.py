"""README.md and its pictures from nbs/index.ipynb. Run: python tools/readme.py"""

import posixpath
import re
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parents[1]
HEADER = "<!-- Made from nbs/index.ipynb by `make readme`. Edit the notebook. -->\n\n"
PICTURES = "nbs/images"  # pictures among the outputs become files index-output-*.png in here
LINK = re.compile(r'(\]\(|src=")(?![a-z]+:|#|/)([^)"\s]+)')
FENCE = re.compile(r"(^```.*?^```)", re.MULTILINE | re.DOTALL)


def render(root: Path = ROOT) -> dict[str, bytes]:  # path below root -> what belongs there
    "README.md and the pictures that the outputs of nbs/index.ipynb hold."
    notebook = nbformat.read(root / "nbs/index.ipynb", as_version=4)
    notebook.cells = [
        cell for cell in notebook.cells if not re.search(r"^#\|\s*hide\b", cell.source, re.M)
    ]
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = from_top_level(cell.source)
        elif re.search(r"^#\|\s*echo:\s*false", cell.source, re.M):
            cell.source = ""
        else:
            cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M).strip()
    notebook.metadata.language_info = {"name": "python"}     # for the colours of the code
    resources = {"unique_key": "index-output", "output_files_dir": PICTURES}
    text, resources = MarkdownExporter().from_notebook_node(notebook, resources)
    text = re.sub(r"^```python\n\s*```\n", "", text, flags=re.M)  # cells without code
    text = re.sub(r"[ \t]+$", "", text, flags=re.M)
    text = re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"
    return {"README.md": (HEADER + text).encode()} | resources["outputs"]


def from_top_level(markdown: str) -> str:
    "Links and pictures relative to nbs/, rewritten to be relative to the folder above it."
    parts = FENCE.split(markdown)
    parts[::2] = [
        LINK.sub(lambda m: m[1] + posixpath.normpath(posixpath.join("nbs", m[2])), part)
        for part in parts[::2]
    ]
    return "".join(parts)


def broken_links(root: Path, text: str) -> list[str]:
    "Files that README.md refers to and that are not there."
    targets = [m[2].split("#")[0] for part in FENCE.split(text)[::2] for m in LINK.finditer(part)]
    return sorted({target for target in targets if not (root / target).exists()})


def main() -> None:
    files = render()
    for old in (ROOT / PICTURES).glob("index-output*"):
        old.unlink()
    for name, content in files.items():
        (ROOT / name).parent.mkdir(parents=True, exist_ok=True)
        (ROOT / name).write_bytes(content)
        print(f"{name} written")


if __name__ == "__main__":
    main()
