"""Whether the Hugging Face hub can be reached. Without it, what its cache holds is used at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

SECONDS = 5.0       # that the hub has to answer


@contextmanager
def hub() -> Iterator[str]:
    """Within the context, read the cache of the hub alone if the hub cannot be reached.

    The package huggingface_hub asks six times within 23 seconds for each file before it looks into its cache.

    Yields:
        Why the hub cannot be reached, in words; nothing if it can.
    """
    from huggingface_hub import constants

    before, reason = constants.HF_HUB_OFFLINE, _why_unreachable()
    constants.HF_HUB_OFFLINE = before or bool(reason)
    try:
        yield reason
    finally:
        constants.HF_HUB_OFFLINE = before


def _why_unreachable() -> str:
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return "the environment variable HF_HUB_OFFLINE is set, so that nothing is asked of the hub"
    try:
        get_session().head(constants.ENDPOINT, timeout=SECONDS)
    except Exception as error:      # of httpx in newer versions of the package, of requests in older ones
        return f"{constants.ENDPOINT} cannot be reached ({str(error).strip() or type(error).__name__})"
    return ""


def advice(name: str, key: str, kind: str) -> str:
    """Return what to do where the hub cannot be reached and its cache does not hold what is asked for.

    Args:
        name: The id.
        key: Key of the run file that names it.
        kind: What the hub calls it: "model" or "dataset".
    """
    from huggingface_hub import constants

    return (f"and the hub's cache ({constants.HF_HUB_CACHE}) does not hold all of {name}. Connect to the network (HTTPS_PROXY names a "
            f"proxy, HF_ENDPOINT a mirror); or run `hf download {name} --repo-type {kind} --local-dir DIR` where there is one, bring DIR "
            f"here, and set {key} to it")
