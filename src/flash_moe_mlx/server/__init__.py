"""An OpenAI-compatible server over one model: Starlette routes, one worker that generates, a bounded queue.

Not a multi-model or multi-user gateway: one model a process, one generation at a time, requests wait their turn.
"""
