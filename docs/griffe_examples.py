"""Tells the reader of docstrings that `Example:` is a section of doctests."""

import griffe


class Examples(griffe.Extension):
    """Griffe reads doctests in sections named `Examples:` only."""

    def on_object(self, *, obj, loader, **kwargs):
        """Renames the section of one object."""
        if obj.docstring:
            obj.docstring.value = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")
