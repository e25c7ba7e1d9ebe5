"""HTTP server: an OpenAI-compatible API that takes speech, and a web page with a microphone.

    server.py       `blsp serve`: flags, address, signals, exit code
    connection.py   time limits of a connection: for the headers, and for fetching the answer
    middleware.py   checks before a route runs: key, host, size and arrival time of a request
    app.py          the routes
    page.py         the files of the page
    api.py          requests and answers in OpenAI's form
    errors.py       errors in OpenAI's form
    responses.py    OpenAI's Responses API, around chat
    transcription.py  transcriptions and translations: fields, pieces, formats
    rate_limit.py   limits per minute: requests, wrong keys, lines in the log
    remote_audio.py  audio behind a URL
    audio_input.py  the audio of a request → samples, within limits
    exchange.py     one request between the event loop and the scheduler; stop strings
    job.py          one answer to generate, and the reports about it
    fair_queue.py   the queue of waiting requests, in which clients take turns
    hearing.py      threads that turn clips into vectors
    scheduler.py    the one thread that generates answers; requests join and leave its batch between steps
    remote.py       the LLM behind vLLM servers (--engine-url)
    shared_recogniser.py  the recogniser of the page's comparison
    metrics.py      counters and histograms for Prometheus
    web/            the page: plain HTML, CSS, JavaScript

Flow: a request → connection → middleware → app → api, audio_input → exchange → **scheduler**
(inference/conversation.py, llm/decoding.py) → exchange → app.
"""
