import sys

from loupe_core.cli import main

sys.exit(main())
