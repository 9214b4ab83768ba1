"""What the command does, in a line of Python each, with results that print well and show as HTML in a notebook.

calls      mine, evaluate, export, chat
results    what they return
"""
