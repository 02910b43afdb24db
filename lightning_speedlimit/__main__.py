"""`python -m lightning_speedlimit` is the command `speedlimit`."""

from lightning_speedlimit.cli import main

if __name__ == "__main__":
    main()
