"""`python -m momaserve_server` is the `momaserve` command."""

import sys

from momaserve_server.cli import main

sys.exit(main())
