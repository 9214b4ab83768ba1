"""Rejections and prompts on disk, and the token ids made of them.

records/      the records file: read, checked, merged, written
importers/    other people's logs --> records
prompts       files of prompts
chat_template conversations --> text, by a model's template
encode        records --> token ids; with answer_text and control_tokens
trie          a record's answers --> the prefix trie with its counts
token_store   tokenised records, memory-mapped
"""
