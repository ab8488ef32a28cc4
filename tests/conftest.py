"""Settings of all tests."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

from hypothesis import HealthCheck, settings

sys.path.insert(0, str(Path(__file__).parent))  # `import harness`

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A process that runs in the background of a shell ignores SIGINT, and so would every process that a test starts and
    # interrupts. A handler is not inherited: the tests still ignore SIGINT, and what they start has the default.
    signal.signal(signal.SIGINT, lambda *_: None)

settings.register_profile(  # property tests draw the same examples in every run
    "exact",
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("exact")
