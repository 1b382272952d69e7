"""`python -m alignops.spans`: the same as `alignops spans`."""

from alignops.__main__ import command

if __name__ == "__main__":
    command("spans")
