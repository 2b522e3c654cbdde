"""``branch/<leaf>``: the same decisions as AdamP's."""

from tests.goldens.methods.adamp import observe as observe
