"""Settings of all tests."""

import os

import hypothesis

# How long an example takes says more about the machine than about the code.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

# The servers that tests start take their settings from the test and from nowhere else.
for name in [name for name in os.environ if name.startswith("CHASQUI_")]:
    del os.environ[name]
