"""Other people's data -> rejection records.

    sources      a file, a folder or a Hub data set -> rows, each with its place
    formats      a row -> the records in it; what is not a rejection is discarded and counted
    scores       whether a score, a label or a word rejects; traces and tables, whose rows say little
    redact       a record without e-mail addresses, phone numbers and keys
    preferences  a row -> the ranking in it, chosen answers kept: for measuring only
    run          both, folded by prompt, into a records file

What this package is not: no row's chosen answer, accepted answer or score ever reaches a record.
"""

from buleyean_rl.data.importers.formats import FORMATS, Format, detect_format, find_format
from buleyean_rl.data.importers.preferences import Preference, Preferences, read_preferences
from buleyean_rl.data.importers.rows import Discards
from buleyean_rl.data.importers.run import ImportReport, import_records
from buleyean_rl.data.importers.scores import Choices
from buleyean_rl.data.importers.sources import is_hub_id, open_rows

__all__ = [
    "FORMATS",
    "Choices",
    "Discards",
    "Format",
    "ImportReport",
    "Preference",
    "Preferences",
    "detect_format",
    "find_format",
    "import_records",
    "is_hub_id",
    "open_rows",
    "read_preferences",
]
