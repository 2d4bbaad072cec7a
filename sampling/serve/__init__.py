"""`hybrid serve`: a model behind OpenAI's protocol, and a page on which its modes can be seen.

protocol -> asks -> decoder (the one thread that owns the session) -> answers; app has the routes, server the process.
"""
