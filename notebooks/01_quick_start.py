# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     notebook_metadata_filter: -jupytext.text_representation.jupytext_version
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Quick start: from nothing to a trained model
#
# A method of optimkit is an optax gradient transformation. We train a Flax NNX classifier on
# scikit-learn's digits with an optimizer put together from pieces, swap it for a published recipe,
# and change a hyperparameter in the middle of a run without compiling anything again.
#
# Runs on two CPU cores in a few seconds.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import optimkit as ok
from optimkit import layout

BLUE, ORANGE = "#0072b2", "#e69f00"  # told apart by colour-blind readers too
plt.rcParams.update({"figure.dpi": 80, "font.size": 11, "axes.grid": True, "grid.alpha": 0.3})

# %% [markdown]
# ## Data and model
#
# 1437 images of 8 x 8 pixels to train on, 360 to test on; two hidden layers.

# %%
digits = load_digits()
images, test_images, labels, test_labels = train_test_split(
    digits.data.astype(np.float32) / 16, digits.target, test_size=360, random_state=0
)


class Classifier(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(64, 128, rngs=rngs)
        self.first_norm = nnx.LayerNorm(128, rngs=rngs)
        self.second = nnx.Linear(128, 128, rngs=rngs)
        self.second_norm = nnx.LayerNorm(128, rngs=rngs)
        self.head = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.first_norm(self.first(x)))
        x = nnx.relu(self.second_norm(self.second(x)))
        return self.head(x)


# %% [markdown]
# Some methods treat hidden matrices, the head and vectors differently. `layout.describe` shows how
# optimkit reads every leaf of this model.

# %%
model = Classifier(nnx.Rngs(0))
print(layout.describe(nnx.state(model, nnx.Param)))

# %% [markdown]
# ## An optimizer of one's own
#
# Every link does one thing, and any optax link fits in between:
#
# 1. `clip_by_tracked_max` cuts entries above the running mean of the leaf's largest entry;
# 2. `momentum_reset` around Adam forgets both moments every 100 steps, then ramps the update up
#    again over 20;
# 3. decoupled weight decay;
# 4. a warmup-stable-decay schedule for the rate.

# %%
EPOCHS, BATCH = 20, 64
STEPS = EPOCHS * (len(images) // BATCH)
INTERVAL = 100

rate = ok.wsd_schedule(3e-3, warmup_steps=40, stable_steps=STEPS - 180, decay_steps=140)
tx = optax.chain(
    ok.clip_by_tracked_max(0.999),
    ok.momentum_reset(ok.scale_by_adam(), interval=INTERVAL, warmup_steps=20),
    optax.add_decayed_weights(0.1),
    optax.scale_by_learning_rate(rate),
)

# %% [markdown]
# ## Training
#
# The usual NNX pattern: `split` the model and the optimizer into a static part and arrays, `merge`
# them inside `jax.jit`. Python code inside a jitted function runs only while JAX traces it, so
# `traced` counts compilations.

# %%
traced = []


@jax.jit
def train_step(graphdef, state, batch, targets):
    traced.append(1)
    model, optimizer = nnx.merge(graphdef, state)

    def loss_fn(model):
        return optax.softmax_cross_entropy_with_integer_labels(model(batch), targets).mean()

    loss, grads = nnx.value_and_grad(loss_fn)(model)
    optimizer.update(model, grads)
    return nnx.state((model, optimizer)), loss


def batches(epochs, seed=0):
    for epoch in range(epochs):
        order = np.random.default_rng([seed, epoch]).permutation(len(images))
        for start in range(0, len(images) - BATCH + 1, BATCH):
            chosen = order[start : start + BATCH]
            yield images[chosen], labels[chosen]


def train(tx, epochs=EPOCHS):
    model = Classifier(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    graphdef, state = nnx.split((model, optimizer))
    losses = []
    for batch, targets in batches(epochs):
        state, loss = train_step(graphdef, state, batch, targets)
        losses.append(loss)
    model, optimizer = nnx.merge(graphdef, state)
    return model, optimizer, np.array(jax.device_get(losses))


def test_accuracy(model):
    return float(np.mean(np.argmax(model(test_images), -1) == test_labels))


def report(model, losses):
    print(f"training loss {losses[:20].mean():.2g} (first 20 steps) -> {losses[-20:].mean():.2g}")
    print(f"test accuracy {test_accuracy(model):.1%}")


model, optimizer, losses = train(tx)
print(f"{STEPS} steps, {len(traced)} compilation")
report(model, losses)

# %% [markdown]
# Look for two things in the next picture: whether the loss jumps where the moments are forgotten
# (dotted lines), and what happens to it while the rate decays.


# %%
def smooth(values, window=10):
    return np.convolve(values, np.ones(window) / window, mode="valid")


steps = np.arange(1, STEPS + 1)
figure, (top, bottom) = plt.subplots(
    2, 1, figsize=(8, 5), sharex=True, height_ratios=(2, 1), layout="constrained"
)
top.semilogy(steps, losses, color=BLUE, alpha=0.3, label="one batch")
top.semilogy(steps[9:], smooth(losses), color=BLUE, label="mean of 10 steps")
top.set(ylabel="training loss (nats)", title="The chain on digits")
bottom.plot(steps, rate(np.arange(STEPS)), color=ORANGE)
bottom.set(xlabel="step", ylabel="learning rate")
for axis in (top, bottom):
    for reset in range(INTERVAL, STEPS + 1, INTERVAL):
        axis.axvline(reset, color="black", linestyle=":", linewidth=1)
top.legend()
plt.show()

# %% [markdown]
# No jump: at every dotted line the moments are gone, and the short ramp keeps the first steps with
# fresh moments small. At the full rate the loss ends up bouncing around 0.01; during the decay it
# falls by two orders of magnitude.

# %% [markdown]
# ## One line for a published recipe
#
# A recipe is such a chain with the paper's defaults. Nothing else changes; only the reset interval
# is shortened, to fit a run of this length.

# %%
recipe_model, _, recipe_losses = train(ok.stable_spam(rate, weight_decay=0.1, reset_interval=200))
report(recipe_model, recipe_losses)

# %% [markdown]
# ## Hyperparameters in the state
#
# `inject_hyperparams` moves the numbers of a factory into the optimizer state, where they can be
# read and replaced between steps.

# %%
tx = ok.inject_hyperparams(ok.stable_spam)(learning_rate=1e-2, weight_decay=0.1)
optimizer = nnx.Optimizer(Classifier(nnx.Rngs(0)), tx, wrt=nnx.Param)
for name, value in optimizer.opt_state.hyperparams.items():
    print(f"{name:<14} {float(value[...]):g}")

# %% [markdown]
# Two runs: one keeps this rate, the other goes on at a tenth of it after 220 steps. Assign an array
# of the same type, so that the compiled step stays valid.


# %%
def train_with_cut(cut_at=None):
    model = Classifier(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    graphdef, state = nnx.split((model, optimizer))
    losses = []
    for step, (batch, targets) in enumerate(batches(EPOCHS)):
        if step == cut_at:
            model, optimizer = nnx.merge(graphdef, state)
            optimizer.opt_state.hyperparams["learning_rate"][...] = jnp.float32(1e-3)
            graphdef, state = nnx.split((model, optimizer))
        state, loss = train_step(graphdef, state, batch, targets)
        losses.append(loss)
    model, optimizer = nnx.merge(graphdef, state)
    return model, optimizer, np.array(jax.device_get(losses))


traced.clear()
_, _, kept_losses = train_with_cut()
cut_model, cut_optimizer, cut_losses = train_with_cut(cut_at=220)
print(f"rate now {float(cut_optimizer.opt_state.hyperparams['learning_rate'][...]):g}")
print(f"{len(traced)} compilation for both runs")
report(cut_model, cut_losses)

# %% [markdown]
# Look for the step at which the two runs part.

# %%
figure, axis = plt.subplots(figsize=(8, 3.2), layout="constrained")
axis.semilogy(steps[9:], smooth(kept_losses), color=ORANGE, label="rate 0.01 throughout")
axis.semilogy(steps[9:], smooth(cut_losses), "--", color=BLUE, label="rate 0.001 after step 220")
axis.axvline(220, color="black", linestyle=":", linewidth=1)
axis.set(xlabel="step", ylabel="training loss (nats)", title="stable_spam, mean of 10 steps")
axis.legend()
plt.show()

# %% [markdown]
# The losses are the same up to step 221 (each is measured before its update). Then the run at 0.001
# falls below 0.0001, while the other one keeps bouncing around 0.02.
#
# Next: `02_surviving_spikes` follows one bad gradient through Stable-SPAM.
