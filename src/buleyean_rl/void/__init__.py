"""The Void: a page on which people talk to the base and the trained model, say no, and train.

    store      questions, answers, rejections and runs in SQLite: what is acknowledged stays
    answering  answers in the making, which go on whether somebody watches or not
    training   a training run in a process of its own, told step by step
    app        the page and its interface over HTTP
    serve      the models, the address, the token

The page itself is three files without a build step; it shows every text as text.
"""
