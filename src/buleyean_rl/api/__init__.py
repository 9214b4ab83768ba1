"""What the command does, in a line of Python each, with results that print well and show as HTML in a notebook.

inputs     files, names or the things themselves --> what the package works on
calls      mine, evaluate, export, chat: the command calls them too
results    what they return
"""
