"""`python -m nybble`: the same as the command `nybble`."""

from nybble.cli import main

if __name__ == "__main__":
    main()
