"""Files here are run by `make interop`, with libraries that the tests do without."""

collect_ignore = ["read_ours.py"]
