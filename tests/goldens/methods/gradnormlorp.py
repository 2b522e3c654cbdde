"""The recorded projectors are injected, and those in force after each refresh compared."""

from tests.goldens.methods.galore import arguments as arguments
from tests.goldens.methods.galore import observe as observe
