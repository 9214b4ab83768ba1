"""Settings of every test: no network, and no test fails because the machine is busy."""

from __future__ import annotations

import os

from hypothesis import settings

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the Hub's client is imported: a test that reaches out fails

settings.register_profile("calm", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("calm")
