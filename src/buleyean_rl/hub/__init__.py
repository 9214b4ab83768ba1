"""The Hugging Face Hub: model and data cards, and uploads.

cards   a run or records --> README.md
push    files --> a repository; nothing is uploaded without being asked for
"""
