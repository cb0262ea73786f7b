"""What all tests share: hypothesis tries the same examples every time, and no clock decides whether it is content.

`HYPOTHESIS_PROFILE=default pytest` looks for new examples.
"""

from __future__ import annotations

import os

from hypothesis import settings

settings.register_profile("same", derandomize=True, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))
