"""Griffe: the docstrings' conventions in the words that it knows."""

import re
from typing import Any

import griffe


class Docstrings(griffe.Extension):
    """Show an ``Example:`` as code, and roles and literal blocks of reStructuredText as Markdown."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change one object's docstring."""
        if obj.docstring is not None:
            text = re.sub(r"^( *)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE)
            text = re.sub(r":(?:class|func|meth|mod|attr):`", "`", text)
            obj.docstring.value = re.sub(r"(\S)::$", r"\1:", text, flags=re.MULTILINE)
