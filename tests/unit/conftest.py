"""What the unit tests share."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from hypothesis import settings

# On a loaded machine a single example can take long; the number of examples bounds the time.
settings.register_profile("unit", deadline=None, max_examples=30)
settings.load_profile("unit")
