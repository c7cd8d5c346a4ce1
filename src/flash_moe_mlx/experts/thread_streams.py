"""MLX streams for threads that come and go: a thread borrows one, and its end gives it back.

MLX makes a stream for each thread that computes, with a thread of its own on the CPU, and keeps both until the process
ends. So a generation on a new thread left an operating system's thread behind.
"""

import threading

import mlx.core as mx

_free: list[mx.Stream] = []
_local = threading.local()


class _Loan:
    """A stream that one thread has until it ends."""

    def __init__(self) -> None:
        try:
            self.stream = _free.pop()
        except IndexError:
            # Any thread may use it; that only one at a time does is what the loan is for.
            self.stream = mx.new_thread_unsafe_stream(mx.cpu)

    def __del__(self) -> None:
        _free.append(self.stream)


def borrow_stream() -> None:
    """Make a lasting stream the default of this thread, for as long as it lives.

    Does nothing on the main thread, the second time, or where a GPU computes. There are as many of these streams as
    there were such threads at once.
    """
    if hasattr(_local, "loan") or threading.current_thread() is threading.main_thread():
        return
    _local.loan = None
    if mx.default_device() == mx.cpu:
        _local.loan = _Loan()
        mx.set_default_stream(_local.loan.stream)
