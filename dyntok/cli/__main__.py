"""`python -m dyntok.cli`, for example under `accelerate launch`."""

import sys

from dyntok.cli.main import main

sys.exit(main())
