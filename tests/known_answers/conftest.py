"""`make.py` is a script that needs the oracles' own packages; nothing in it is a test."""

collect_ignore = ["make.py"]
