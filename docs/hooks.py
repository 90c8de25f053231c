"""For mkdocs: the pages and pictures of the site that are not in docs/.

Pages link to other files of the repository by relative paths, as they would on GitHub. Here Markdown files of other
folders become pages, their pictures are copied, and a link to any other file of the repository becomes plain text.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
STUDIES = sorted(ROOT.glob("recipes/results/study/*/study.md"))
PAGES = {
    "index.md": "README.md",
    "benchmarks.md": "benchmarks/README.md",
    "evaluation.md": "eval/README.md",
    "contributing.md": "CONTRIBUTING.md",
    **{f"study/{path.parent.name}.md": path.relative_to(ROOT).as_posix() for path in STUDIES},
}
PICTURES = ("benchmarks/results/*.png", "eval/results/*.png", "recipes/results/*.png")
ON_SITE = {path: page for page, path in PAGES.items()}
TYPE = re.compile(r"(?<=\(<code>)`[^<]*(?=</code>)")
LINK = re.compile(r"\[([^\]\[]*)\]\(([^)\s#:]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what is not in docs/."""
    for page, path in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / path)))
    for pattern in PICTURES:
        for picture in sorted(ROOT.glob(pattern)):
            path = picture.relative_to(ROOT).as_posix()
            files.append(File.generated(config, path, abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn the links of a page to where their targets are on the site."""
    uri = page.file.src_uri
    folder = posixpath.dirname(PAGES.get(uri, f"docs/{uri}"))

    def turn(link: re.Match) -> str:
        text, target, anchor = link[1], posixpath.normpath(posixpath.join(folder, link[2])), link[3] or ""
        on_site = ON_SITE.get(target, target.removeprefix("docs/"))
        if on_site in files.src_uris:
            return f"[{text}]({posixpath.relpath(on_site, posixpath.dirname(uri))}{anchor})"
        return text if (ROOT / target).exists() else link[0]  # a broken link is left for mkdocs to report

    return LINK.sub(turn, markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Take the Markdown out of the arguments' types, which docstrings write as "`float` or `str`, *optional*"."""
    return TYPE.sub(lambda found: found[0].replace("`", "").replace("*", ""), html)
