"""Scripts that need the oracles' own packages; nothing in them is a test."""

collect_ignore = ["make.py", "make_packed.py"]
