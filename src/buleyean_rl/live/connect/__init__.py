"""Rated answers, fetched from where people rate them.

    source --fetch, since the cursor--> rows.jsonl --data/importers--> records.jsonl, for `train`

A source knows an interface and its pages; what a row means is the importers' business.
"""
