"""`python -m llmnorm` is the `llmnorm` command."""

from llmnorm.cli import main

if __name__ == "__main__":
    main()
