"""Over HTTP: an OpenAI-compatible API that takes speech, and a web page with a microphone.

    process.py    `blsp serve`: flags, the address, the signals, the exit code
    app.py        the routes and the page
    guard.py      what is checked before a route runs: key, size of the request
    schema.py     requests and errors in OpenAI's form
    sound.py      what a request brings as audio -> samples, within limits
    exchange.py   one request's way through the scheduler and back
    scheduler.py  one thread that asks the model: requests join and leave the one decode loop between steps
    writing.py    tokens of one answer -> pieces of text, stop strings, SSE
    replies.py    answers in OpenAI's forms, whole or as server-sent events
    recogniser.py the cascade's first half, for the page's comparison
    metrics.py    counters and histograms for Prometheus
    web/          the page: plain HTML, CSS, JavaScript

Flow: a request -> guard -> schema -> sound -> **scheduler** (inference/conversation.py, llm/decoding.py) -> writing.
"""
