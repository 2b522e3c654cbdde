"""One layer, forward and backward: the layers of both kinds, and the transformation behind them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

import optimkit as ok
from optimkit import nn
from optimkit.matrices.input_gram import input_rows
from tests.goldens.golden import Golden, relative_error

NOT_COMPARED = dict.fromkeys(("x", "kernel", "bias", "grad_z"), "an input")


def run(golden: Golden, **overrides: Any) -> dict[str, float]:
    kwargs = {**golden.kwargs, **overrides}
    lam = kwargs.pop("l")
    x, kernel, bias, grad_z = (jnp.asarray(golden.arrays[n]) for n in NOT_COMPARED)
    kind = "conv" if "kernel_size" in kwargs else "dense"

    if kind == "conv":
        window = kwargs.pop("kernel_size")
        module = nn.TrActConv(kernel.shape[-1], window, l=lam, param_dtype=float, **kwargs)

        def layer(x: Any, kernel: Any, bias: Any) -> Any:
            return nn.tract_conv(x, kernel, bias, l=lam, **kwargs)

        rows = input_rows(x, kind=kind, kernel_size=window, **kwargs)
        named = {"patches": rows.reshape(-1, rows.shape[-1])}
    else:
        window = None
        module = nn.TrActDense(kernel.shape[-1], l=lam, param_dtype=float)

        def layer(x: Any, kernel: Any, bias: Any) -> Any:
            return nn.tract_dense(x, kernel, bias, l=lam)

        named = {}

    def flax(x: Any, kernel: Any, bias: Any) -> Any:
        return module.apply({"params": {"kernel": kernel, "bias": bias}}, x)

    parts = ("grad_x", "grad_kernel", "grad_bias")
    for suffix, function in (("", layer), (" (Flax)", flax)):
        z, pull = jax.vjp(function, x, kernel, bias)
        found = {"z": z, **dict(zip(parts, pull(grad_z), strict=True))}
        named |= {name + suffix: value for name, value in found.items()}

    plain = jax.vjp(lambda k: _plain(x, k, kind, kwargs), kernel)[1](grad_z)[0]
    named["grad_kernel_plain"] = plain
    grads = {"stem": {"kernel": plain, "bias": bias}}
    options = {"path": "stem/kernel", "kind": kind, "kernel_size": window, **kwargs}
    gram = (nn.tract_gram(x, kind=kind, kernel_size=window, **kwargs), 1)
    for method in ("solve", "cholesky"):
        tx = ok.tract_precondition(lam, method=method, **options)
        for name, extra in (
            ("inputs", {"first_layer_inputs": x}),
            ("gram", {"first_layer_gram": gram}),
        ):
            new: Any = tx.update(grads, tx.init(grads), grads, **extra)[0]
            named[f"grad_kernel ({method}, {name})"] = new["stem"]["kernel"]
    return {
        name: relative_error(value, golden.arrays[name.split(" ")[0]])
        for name, value in named.items()
    }


def _plain(x: Any, kernel: Any, kind: str, kwargs: dict[str, Any]) -> Any:
    if kind == "dense":
        return x @ kernel
    padding = kwargs["padding"]
    sides = [padding] * 2 if isinstance(padding, int) else padding
    strides = kwargs["strides"]
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        [strides] * 2 if isinstance(strides, int) else strides,
        [(p, p) if isinstance(p, int) else tuple(p) for p in sides],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
