"""`python -m daqconvert.cli` is `daqconvert`."""

from daqconvert.cli import main

if __name__ == "__main__":
    main()
