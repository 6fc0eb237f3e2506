"""rlax is the independent source of several tests here. Importing it imports
tensorflow-probability, which reads deprecated names of jax: that is theirs to mend, so their
warnings are ignored for this first import, and only for it."""

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    import rlax  # noqa: F401
