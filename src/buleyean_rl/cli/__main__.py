"""`python -m buleyean_rl.cli` is the command, as `python -m buleyean_rl` is."""

from buleyean_rl.cli import main

raise SystemExit(main())
