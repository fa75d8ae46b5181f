# The compiled module. Its functions are described where they are bound, in csrc/.
from typing import Any

def __getattr__(name: str) -> Any: ...
