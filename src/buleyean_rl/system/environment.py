"""What the libraries below torch read from the environment when they are loaded; imported before torch is."""

from __future__ import annotations

import os

DEFAULTS = {
    # A process that loses the others says so in a line; torch would add a page for each connection.
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    # OpenMP's threads wait for each other in a loop, by default so long that beside another busy program a run gets
    # ten times slower. 4,000 turns cost nothing on an idle machine.
    "GOMP_SPINCOUNT": "4000",
    # oneDNN keeps a kernel for each shape of a product, a megabyte each and by default 1,024 of them. A row's products
    # are of some 40 shapes, all layers' alike.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",
}

for name, value in DEFAULTS.items():
    os.environ.setdefault(name, value)
