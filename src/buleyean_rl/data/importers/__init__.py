"""Other people's data -> rejection records.

    protocol       Format: how one shape of row is read
    formats        the table of formats, and which one a source is in
      canonical    records, as training reads them
      pairs        a chosen and a rejected answer
      labels       an answer and a label (KTO, thumbs)
      ranked       several answers with scores or counts
      open_webui   Open WebUI's exports
      librechat    LibreChat's exports
      traces       Langfuse and LangSmith
      columns      tables whose columns the user names
    rows, scores, names, literals, reasoning, threads, suggest   what the formats share
    expand         names, patterns and folders -> files and data sets, in one order
    sources        a file, a folder or a Hub data set -> numbered rows
      text_files, json_files, tables, arrow_files   by kind of file
    redact         a record without e-mail addresses, phone numbers and keys
    run            sources, folded by prompt, into a records file
    preferences    rows, chosen answers too, as rankings: for measuring only

No score reaches a record, and no answer that was chosen from others. Answers of the judged model itself that were
accepted reach it with count 0, as anchors (`Format.keeps_accepted`).
"""

from buleyean_rl.data.importers.preferences import Preferences, read_preferences
from buleyean_rl.data.importers.protocol import Choices, Preference
from buleyean_rl.data.importers.run import import_records

__all__ = ["Choices", "Preference", "Preferences", "import_records", "read_preferences"]
