"""The long description of the package: README.md without what only works inside the repository."""

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface


class Description(MetadataHookInterface):
    """Sets `readme` for [project] of pyproject.toml."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Add the description. An index of packages shows no pictures and follows no links of a repository."""
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        metadata["readme"] = {"content-type": "text/markdown", "text": without_links(text)}


def without_links(markdown: str) -> str:
    """Markdown without comments, pictures, and links to files; the text of a link stays."""
    text = re.sub(r"^(<!--.*-->|!\[[^\]]*\]\((?!\w+:)[^)]*\))\n\n?", "", markdown, flags=re.MULTILINE)
    return re.sub(r"(?<!!)\[([^\]]*)\]\((?!\w+:)[^)]*\)", r"\1", text)
