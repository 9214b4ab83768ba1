"""The Void: a page on which people talk to the base and the trained model, reject answers, and train.

    store      questions, answers, rejections and runs in SQLite
    answering  answers being generated
    training   a training run in a process of its own
    app        the page and its interface over HTTP
    access     token, host, origin, content policy
    serve      models, address, token: ready to run

The page is three files without a build step; every text is shown as text.
"""
