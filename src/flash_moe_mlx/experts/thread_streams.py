"""MLX streams for short-lived threads: a thread borrows a stream, which is returned when the thread ends.

MLX creates a stream for each thread that computes, on the CPU with an operating-system thread of its own, and keeps
both until the process ends. Without borrowing, every generation on a new thread would leak a thread.
"""

import threading

import mlx.core as mx

_free: list[mx.Stream] = []
_local = threading.local()


class _Loan:
    """A stream that one thread owns until it ends."""

    def __init__(self) -> None:
        try:
            self.stream = _free.pop()
        except IndexError:
            # Any thread may use the stream; the loan ensures that only one does at a time.
            self.stream = mx.new_thread_unsafe_stream(mx.cpu)

    def __del__(self) -> None:
        _free.append(self.stream)


def borrow_stream() -> None:
    """Make a long-lived stream the default of this thread, for as long as the thread lives.

    Does nothing on the main thread, on repeated calls, or if a GPU computes. There are as many of these streams as
    there were such threads at once.
    """
    if hasattr(_local, "loan") or threading.current_thread() is threading.main_thread():
        return
    _local.loan = None
    if mx.default_device() == mx.cpu:
        _local.loan = _Loan()
        mx.set_default_stream(_local.loan.stream)
