"""Run the command line: `python -m kernels_core` is `kernels-core`."""

from .cli import main

if __name__ == "__main__":
    main()
