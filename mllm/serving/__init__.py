"""Serves a model over HTTP in the form of OpenAI's API; nothing here is imported unless a server is started."""
