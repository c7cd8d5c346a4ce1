"""An OpenAI-compatible server for one model: Starlette routes, one generating worker, a bounded queue.

Not a multi-model or multi-user gateway: one model per process, one generation at a time; other requests wait.
"""
