"""Work for processes of a test: without torch, so that they start at once."""
import os
import signal
import time


def start():
    return double


def double(item, progress, stop):
    progress.note(f"at {item}")
    if item == "wait":
        print("waiting", flush=True)
        time.sleep(600)
    if item == "spared":
        return signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    if item == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    return os.environ["GPU_OF_A_TEST"] if item == "gpu" else 2 * item


def spared(*_):
    """Whether Ctrl-C is ignored in this process, in the place of a client's visit."""
    return signal.getsignal(signal.SIGINT) == signal.SIG_IGN, {}
