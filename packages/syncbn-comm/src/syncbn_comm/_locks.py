"""Where every lock of the package comes from, so that a test can put in locks whose schedule it controls."""

from __future__ import annotations

import threading
from collections.abc import Callable

new_lock: Callable[[], threading.Lock] = threading.Lock
