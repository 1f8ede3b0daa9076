"""`python -m daqconvert` is `daqconvert`; so are `accelerate launch -m daqconvert` and `torchrun -m daqconvert`."""

from daqconvert.cli import main

if __name__ == "__main__":
    main()
