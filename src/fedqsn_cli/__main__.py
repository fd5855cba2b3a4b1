"""`python -m fedqsn_cli` is `fedqsn`."""

from __future__ import annotations

import sys

from fedqsn_cli.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
