"""`python -m musubi_tuner ...` is `musubi ...`."""

import sys

from musubi_tuner.cli import main

if __name__ == "__main__":
    sys.exit(main())
