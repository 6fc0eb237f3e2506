"""A hook of mkdocs: the site has the repository's layout.

README.md is its first page, docs/ and notebooks/ are folders beside it, and so a link that works
where the repository is shown works on the site as well.
"""

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
SHOWN = (
    "*.md",
    "LICENSE",
    "docs/**/*",
    "notebooks/*",
    "tests/oracles/*.py",
)
"""Everything that a page links to; mkdocs refuses a link to anything else."""


def on_files(files: Files, config: Any) -> Files:
    """The files of the site, under their paths in the repository."""
    theme = [file for file in files if file.src_dir != config.docs_dir]
    paths = sorted({path for pattern in SHOWN for path in ROOT.glob(pattern) if path.is_file()})
    shown = [
        File(
            path.relative_to(ROOT).as_posix(),
            src_dir=str(ROOT),
            dest_dir=config.site_dir,
            use_directory_urls=config.use_directory_urls,
        )
        for path in paths
    ]
    return Files([*theme, *shown])
