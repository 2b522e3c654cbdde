"""What a method records beyond the parameters: one module a method, found by its name.

A module may define ``observe(golden, params, states) -> {array name: value}`` (further arrays of a
trajectory or combiner), ``run(golden, **overrides) -> {array name: error}`` (a golden of no common
kind), and ``NOT_COMPARED = {array or folder: reason}``.
"""
