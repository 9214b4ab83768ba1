"""A model that answers others: the OpenAI API, and another model put in its place while it answers.

    name --prepare--> target --engine--> a process that answers --gate--> serving --proxy--> replies

The front is one asyncio process that knows nothing of tokens; every engine has a process of its own.
"""
