"""The machine: files, caches, memory, environment. Nothing here knows of models."""
