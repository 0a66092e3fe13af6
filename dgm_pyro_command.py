"""``dgm``: outside the package, so that Ctrl-C ends in one line also while the package and torch are loaded."""

import os
import signal
import sys


def main() -> int:
    """Run ``dgm``; its exit status."""
    before = signal.signal(signal.SIGINT, _interrupted)
    from dgm_pyro import cli

    signal.signal(signal.SIGINT, before)
    return cli.main()


def _interrupted(*_: object) -> None:
    # No exception: libraries that are being loaded take it for a failure of their own, and say so.
    sys.stderr.write("dgm: interrupted\n")
    sys.stderr.flush()
    os._exit(130)


if __name__ == "__main__":
    sys.exit(main())
