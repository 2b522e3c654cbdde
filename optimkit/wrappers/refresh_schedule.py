"""When projectors are made anew, and what becomes of the moments that the old ones left."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from optimkit.layout import named_leaves
from optimkit.protocols import Array, PyTree
from optimkit.wrappers.projectors import ProjectorRule, Side, new_projectors, project_leaves
from optimkit.wrappers.subspace_moments import moments_by_leaf, turned_moment

ON_REFRESH = ("keep", "rotate", "reset")


class RefreshSchedule(NamedTuple):
    """``rule``: how projectors are made. ``every``: steps between two refreshes; None for none.

    ``stagger``: leaves take turns. ``moments``: they are kept, rotated with the subspace, or reset.
    ``stored``: projectors are kept from step to step; else each step makes the same ones again.
    """

    rule: ProjectorRule
    every: int | None
    stagger: bool
    moments: Literal["keep", "rotate", "reset"]
    stored: bool

    def due(self, count: Array, offset: int) -> tuple[Array, Array]:
        """Whether leaves of that offset are renewed, and how often they have been before."""
        if self.every is None:
            return jnp.zeros((), bool), jnp.zeros((), jnp.int32)
        at = count + offset
        return (count == 0) | (at % self.every == 0), at // self.every


def renew(
    schedule: RefreshSchedule,
    count: Array,
    grads: PyTree,
    sides: Sequence[Sequence[int]],
    held: Sequence[Sequence[Array]],
    init: Callable[[PyTree], PyTree],
    state: PyTree,
) -> tuple[list[list[Array]], PyTree]:
    """The projectors in force, and the inner state whose moments know about them.

    Args:
      schedule: when and how.
      count: steps made before this one.
      grads: the gradients, from which projectors are made.
      sides: per leaf, its projected sides.
      held: per leaf, the projector of each side so far.
      init: of the inner transformation, to find its moments.
      state: the inner state.
    """
    projectors = [list(own) for own in held]
    low = [index for index, own in enumerate(sides) if own]
    if not low or (schedule.every is None and schedule.stored):
        return projectors, state
    named = named_leaves(grads)
    kept, structure = jax.tree.flatten(state)
    moments: dict[int, list[tuple[int, bool]]] = {}
    if schedule.moments != "keep":
        moments = moments_by_leaf(init, state, project_leaves(grads, projectors, sides))
    groups = [[index] for index in low] if schedule.stagger else [low]
    for turn, members in enumerate(groups):
        now, refresh = schedule.due(count, turn * (schedule.every or 0) // len(groups))
        places = [place for index in members for place, _ in moments.get(index, ())]

        def new(members: list[int] = members, refresh: Array = refresh) -> Any:
            asked = [
                Side(index, *named[index], axis, previous, refresh)
                for index in members
                for axis, previous in zip(sides[index], projectors[index], strict=True)
            ]
            found = iter(new_projectors(schedule.rule, asked))
            after = {index: [next(found) for _ in projectors[index]] for index in members}
            moved = [
                turned_moment(kept[place], squared, projectors[index], after[index], sides[index])
                if schedule.moments == "rotate"
                else jnp.zeros_like(kept[place])
                for index in members
                for place, squared in moments.get(index, ())
            ]
            return [after[index] for index in members], moved

        def old(members: list[int] = members, places: list[int] = places) -> Any:
            return [projectors[index] for index in members], [kept[place] for place in places]

        always = schedule.every == 1 or not schedule.stored
        made, moved = new() if always else jax.lax.cond(now, new, old)
        for index, own in zip(members, made, strict=True):
            projectors[index] = own
        for place, moment in zip(places, moved, strict=True):
            kept[place] = moment
    return projectors, structure.unflatten(kept)
