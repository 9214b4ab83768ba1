"""`python -m buleyean_rl` is the command."""

from buleyean_rl.cli import main

raise SystemExit(main())
