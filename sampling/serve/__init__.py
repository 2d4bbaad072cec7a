"""`hybrid serve`: a model behind OpenAI's protocol, and a page on which its modes can be seen.

app.py says at its top what becomes of a request.
"""
