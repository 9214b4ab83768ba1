"""The Void: a page on which people talk to the base and the trained model, reject answers, and train.

    store      conversations, answers, rejections, batches and runs in SQLite
    answering  answers being written
    training   a training run in a process of its own
    models     what runs have become; files: what people take away of them
    app        the page and its interface over HTTP
    access     token, host, origin, content policy
    serve      address, token, models: ready to run

The page has no build step. An answer's Markdown is rendered and cleaned here; every other text is shown as text.
"""
