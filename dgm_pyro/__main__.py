"""``python -m dgm_pyro`` is ``dgm``."""

import sys

from dgm_pyro.cli import main

if __name__ == "__main__":
    sys.exit(main())
