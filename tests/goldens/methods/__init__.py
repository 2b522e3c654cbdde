"""What a method records beyond the parameters: one module a method, found by its name.

A module may define ``observe(golden, params, states) -> {array name: value}`` (further arrays of a
trajectory or combiner), ``run(golden, **overrides) -> {array name: error}`` (a golden of no common
kind; with ``RUNS_ALL = True``, any golden of the method), ``NOT_COMPARED = {array or folder:
reason}``, ``extras(golden)``, the extra arguments of every update, ``gradient(golden)``, a
function of the parameters that takes the place of the
recorded gradients, ``arguments(golden) -> kwargs`` where the meta
describes our arguments in words of its own, and ``DESCRIBED``, the words that we have no argument
for.
"""
